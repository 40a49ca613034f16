// Operators on CUDA that others are made of: as if called through the dispatcher, with its checks.
#pragma once

#include <optional>

#include "binding.h"

namespace flashmoe {

Tensor permute_tokens(const Tensor& x, const Tensor& row_slot, const Tensor& slot_row);
// Some columns of x, from `first` on, into memory for [R, columns]. Of what permute_tokens takes, with contiguous maps.
void permute_columns(const Tensor& x, int64_t first, int64_t columns, const Tensor& row_slot, const Tensor& slot_row,
                     void* rows);
Tensor combine_rows(const Tensor& rows, const Tensor& slot_row, const std::optional<Tensor>& weights);

}  // namespace flashmoe
