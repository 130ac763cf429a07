// As much of CUDA as csrc/cuda needs, on the CPU: a thread block is a set of fibers that yield to
// each other at barriers, one block after another. It finds wrong indices, missing barriers around
// shared memory and wrong arithmetic; it says nothing of speed or of the hardware.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;

// Everybody waits for the generation in which the last one came.
struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Block {
    ucontext_t first;  // a fiber starts by its context and goes on by a jump, which is cheaper
    jmp_buf scheduler;
    struct Fiber {
        ucontext_t start;
        jmp_buf rest;
        bool started;
    };
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<bool> done;
    std::vector<Barrier> warps;
    std::vector<uint64_t> exchanged;
    Barrier all;
    void (*body)(void*) = nullptr;
    void* context = nullptr;
};

inline Block block;
inline unsigned current;

inline void yield() {
    if (!_setjmp(block.fibers[current].rest)) _longjmp(block.scheduler, 1);
}

inline void resume(Block::Fiber& fiber) {
    if (_setjmp(block.scheduler)) return;
    if (fiber.started) _longjmp(fiber.rest, 1);
    fiber.started = true;
    swapcontext(&block.first, &fiber.start);
}

inline void wait(Barrier& barrier, unsigned expected) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) yield();
}

}  // namespace emulator

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kDynamicShared = 48 << 10;  // bytes, NaN when a block begins
inline float4 dynamic_shared[kDynamicShared / sizeof(float4)];

inline void __syncthreads() { emulator::wait(emulator::block.all, blockDim.x); }
inline void __syncwarp() {
    emulator::wait(emulator::block.warps[threadIdx.x / emulator::kWarp], emulator::kWarp);
}

inline float __shfl_down_sync(unsigned, float value, int by) {
    uint64_t* warp = &emulator::block.exchanged[threadIdx.x / emulator::kWarp * emulator::kWarp];
    const unsigned lane = threadIdx.x % emulator::kWarp;
    memcpy(&warp[lane], &value, sizeof value);
    __syncwarp();
    float other = value;
    if (lane + by < emulator::kWarp) memcpy(&other, &warp[lane + by], sizeof other);
    __syncwarp();
    return other;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t{a} * b) >> 32); }

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
    return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
}

namespace emulator {

inline void enter() {
    block.body(block.context);
    block.done[current] = true;
    yield();
}

inline void run_block(unsigned threads, void (*body)(void*), void* context) {
    memset(dynamic_shared, 0xFF, sizeof dynamic_shared);
    block.body = body;
    block.context = context;
    block.fibers.resize(threads);
    block.done.assign(threads, false);
    block.warps.assign((threads + kWarp - 1) / kWarp, {});
    block.exchanged.assign(threads, 0);
    block.all = {};
    while (block.stacks.size() < threads) block.stacks.emplace_back(new char[kStack]);
    for (unsigned thread = 0; thread < threads; ++thread) {
        ucontext_t& start = block.fibers[thread].start;
        getcontext(&start);
        start.uc_stack.ss_sp = block.stacks[thread].get();
        start.uc_stack.ss_size = kStack;
        start.uc_link = nullptr;
        makecontext(&start, enter, 0);
        block.fibers[thread].started = false;
    }
    for (unsigned left = threads; left > 0;)
        for (unsigned thread = 0; thread < threads; ++thread) {
            if (block.done[thread]) continue;
            current = thread;
            threadIdx = dim3(thread);
            resume(block.fibers[thread]);
            left -= block.done[thread];
        }
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    if (config->dynamicSmemBytes > kDynamicShared) return cudaErrorInvalidValue;
    const auto call = [&] { kernel(arguments...); };
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    for (unsigned y = 0; y < gridDim.y; ++y)
        for (unsigned x = 0; x < gridDim.x; ++x) {
            blockIdx = dim3(x, y);
            emulator::run_block(
                blockDim.x,
                [](void* context) {
                    (*static_cast<std::remove_reference_t<decltype(call)>*>(context))();
                },
                const_cast<void*>(static_cast<const void*>(&call)));
        }
    return cudaSuccess;
}
