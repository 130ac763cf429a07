#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace fastgen::FASTGEN_ISA {

// Memory that grows and stays. Zero when new: tiles read beyond what was written, and what happens
// to lie there might be denormal, which is slow. Nothing of the standard library's here: its
// functions, compiled for one instruction set, could be linked in place of another's.
struct Buffer {
    char* room = nullptr;
    size_t size = 0;

    ~Buffer() { free(room); }

    char* of(size_t bytes) {
        if (bytes + 64 > size) {
            free(room);
            size = bytes + 64;
            room = static_cast<char*>(calloc(size, 1));
            if (!room) abort();
        }
        return room + (-reinterpret_cast<uintptr_t>(room) & 63);
    }

    template <typename T>
    T* of_type(size_t count) {
        return reinterpret_cast<T*>(of(count * sizeof(T)));
    }
};

}  // namespace fastgen::FASTGEN_ISA
