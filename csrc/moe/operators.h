// An operator on CUDA that others are made of: as if called through the dispatcher, with its checks.
#pragma once

#include <optional>

#include "binding.h"

namespace flashmoe {

// K of slot_row [T, K].
int check_slots(const Tensor& slot_row);

Tensor combine_rows(const Tensor& rows, const Tensor& slot_row, const std::optional<Tensor>& weights);

}  // namespace flashmoe
