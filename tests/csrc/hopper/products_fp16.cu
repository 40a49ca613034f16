// wgmma of fp16: see products.cuh.
#include "products.cuh"

using namespace flashmoe::hopper;

EXPORT int hopper_product_fp16(const ProductParams* p, int n, int a, int b) {
  return run([&] { return product<__half>(*p, n, a, b, TestedN()); });
}
