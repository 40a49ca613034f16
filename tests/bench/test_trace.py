"""What is made of a profiler's trace: kinds of kernels, hidden communication, time without work, waits."""

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe_train.bench import trace
from flashmoe_train.bench.trace import Slice


@pytest.mark.parametrize(
    "name, part",
    [
        ("void flashmoe::(anonymous namespace)::forward_kernel<Sizes<__nv_bfloat16, 64>>(Work)", "our attention"),
        ("flashmoe::(anonymous namespace)::list_kernel(flashmoe::Schedule, int)", "our attention"),
        ("void flashmoe::(anonymous namespace)::dispatch_kernel<8>(flashmoe::DispatchParams)", "our exchange"),
        ("flashmoe::(anonymous namespace)::wait_kernel(flashmoe::Link)", "our exchange"),
        ("flashmoe::(anonymous namespace)::zero_nobodys_kernel(Params)", "our mixture of experts"),
        ("void flashmoe::(anonymous namespace)::combine_backward_kernel<__half>(Params)", "our mixture of experts"),
        ("void flashmoe::(anonymous namespace)::sum_parts_kernel<float>(Params)", "our mixture of experts"),
        ("triton_tem_fused_flex_attention_backward_3", "other attention"),
        ("triton_tem_fused_zeros_1", "other attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128", "other attention"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "exchange"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce-scatter"),
        ("ncclDevKernel_AllReduce_Sum_f32_TREE_LL(ncclDevKernelArgsStorage<4096ul>)", "other collectives"),
        ("void cutlass::device_kernel<at::cuda::enable_3x<cutlass::gemm::GroupProblemShape<int>>>(P)", "grouped GEMM"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "dense GEMM"),
        ("void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16>(Params)", "dense GEMM"),
        ("triton_tem_fused_mm_5", "dense GEMM"),
        ("triton_red_fused__to_copy_add_index_mm_mul_2", "compiled elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies, casts and fills"),
        ("void at::native::elementwise_kernel<128, direct_copy_kernel_cuda>(int)", "copies, casts and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>(int)", "copies, casts and fills"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>(T)", "optimizer and clipping"),
        ("void at::native::indexing_backward_kernel<float, 4>(long)", "index, scatter, sort"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<long>(int)", "index, scatter, sort"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>(int)", "elementwise and reductions"),
        ("spin_kernel(long)", "other"),
        ("flashmoe::attention_backward", "our attention"),
        ("flashmoe::ep_forward", "our exchange"),
        ("flashmoe::moe_forward", "our mixture of experts"),
        ("aten::_grouped_mm", "grouped GEMM"),
        ("aten::mm", "dense GEMM"),
        ("aten::embedding", "index, scatter, sort"),
        ("gloo:all_to_all", "exchange"),
    ],
)
def test_kinds_of_kernels(name: str, part: str) -> None:
    assert trace.part_of(name) == part


def event(cat: str, name: str, begin: float, end: float, tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "pid": 0, "tid": tid}


GATHER, GEMM = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "nvjet_tst_128x256"


def test_a_step_on_a_gpu(tmp_path: Path) -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("kernel", GEMM, 1000, 3000),
        event("kernel", GATHER, 2000, 6000, 20),  # hidden from 2000 to 3000 and from 5000 to 6000
        event("kernel", GEMM, 5000, 7000),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 9000, 9500),
        event("cuda_runtime", "cudaStreamSynchronize", 8000, 9600, 1),
        event("cuda_runtime", "cudaLaunchKernel", 100, 110, 1),
        event("cpu_op", "aten::mm", 90, 120, 1),  # is not what the GPU did
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = trace.summarise(tmp_path / "trace.json")
    assert found["parts"] == {
        "all-gather": {"ms": 4.0, "hidden": 2.0, "launches": 1},
        "dense GEMM": {"ms": 4.0, "hidden": 0.0, "launches": 2},
        "copies, casts and fills": {"ms": 0.5, "hidden": 0.0, "launches": 1},
    }
    assert found["busy_ms"] == 6.5
    assert [*found["waits"].values()] == [1, 1, 0]
    assert found["kernels"][:2] == [
        {"name": "ncclDevKernel_AllGather_RING_LL", "part": "all-gather", "ms": 4.0, "launches": 1},
        {"name": GEMM, "part": "dense GEMM", "ms": 4.0, "launches": 2},
    ]


def test_operators_of_a_cpu_have_the_time_that_they_do_not_spend_in_others(tmp_path: Path) -> None:
    events = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::mm", 20, 60),
        event("cpu_op", "aten::empty", 20, 30),
        event("cpu_op", "aten::silu", 120, 150),
        event("user_annotation", "ProfilerStep#3", 0, 200),
        event("user_annotation", "gloo:all_to_all", 50, 170, 8),
    ]
    assert sorted((one.name, one.begin, one.end) for one in trace.slices(events)) == [
        ("aten::empty", 20, 30),
        ("aten::linear", 0, 20),
        ("aten::linear", 60, 100),
        ("aten::mm", 30, 60),
        ("aten::silu", 120, 150),
        ("gloo:all_to_all", 50, 170),
    ]


def test_time_belongs_to_computation_first_and_is_counted_once() -> None:
    found = [Slice(0, 10, GATHER), Slice(2, 6, GEMM), Slice(4, 8, "aten::silu"), Slice(20, 21, GATHER)]
    assert trace.partition(found) == [4, 4, 2, 1]
