// What the straight paths of quick.cpp and scheduler.cpp share.
#pragma once

#include "call.h"

namespace fastgen {

// Whether a kernel here can have the tensor: on the CPU, or on the GPU that is in use.
bool is_in_reach(const View& view);

inline bool is_beside(const View& view, const View& first) {
    return view.on_cpu == first.on_cpu && view.gpu == first.gpu;
}

#if defined(FASTGEN_CUDA)
#define FASTGEN_RUN_AT(place, op, params, grain, threads)                     \
    ((place).gpu >= 0 ? run_cuda(cuda::op, params, torch_stream((place).gpu)) \
                      : run_cpu(cpu_kernels().op, params, grain, threads))
#else
#define FASTGEN_RUN_AT(place, op, params, grain, threads) \
    run_cpu(cpu_kernels().op, params, grain, threads)
#endif

}  // namespace fastgen
