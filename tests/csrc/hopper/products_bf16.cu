// wgmma of bf16: see products.cuh.
#include "products.cuh"

using namespace flashmoe::hopper;

EXPORT int hopper_product_bf16(const ProductParams* p, int n, int a, int b) {
  return run([&] { return product<__nv_bfloat16>(*p, n, a, b, TestedN()); });
}
