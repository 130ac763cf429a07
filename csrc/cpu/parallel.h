// Threads of the OpenMP runtime that torch has already loaded, found by name; fastgen brings none.
#pragma once

#include <stdint.h>

namespace fastgen {

// Calls body(context, begin, end) over a partition of [0, count) into at most `threads` ranges.
// Without a runtime to borrow, and in a child after fork, the caller does all the work.
void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t, int64_t), void* context);

// The library the threads come from, or "serial".
const char* parallel_runtime();

template <typename Body>
static void parallel_for(int64_t count, int threads, const Body& body) {
    parallel_for(
        count, threads,
        [](void* context, int64_t begin, int64_t end) {
            (*static_cast<const Body*>(context))(begin, end);
        },
        const_cast<Body*>(&body));
}

}  // namespace fastgen
