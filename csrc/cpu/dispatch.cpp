#include <string.h>

#include "kernels.h"

namespace fastgen {
namespace {

const CpuKernels* find(const char* isa) {
#if defined(FASTGEN_X86)
    if (strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &avx512::kernels;
    if (strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &avx2::kernels;
#endif
    return strcmp(isa, "baseline") == 0 ? &baseline::kernels : nullptr;
}

const CpuKernels* widest() {
    if (const CpuKernels* table = find("avx512")) return table;
    if (const CpuKernels* table = find("avx2")) return table;
    return &baseline::kernels;
}

const CpuKernels* chosen = widest();

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen; }

bool choose_cpu_kernels(const char* isa) {
    const CpuKernels* table = find(isa);
    if (table) chosen = table;
    return table != nullptr;
}

bool has_cpu_kernels(const char* isa) { return find(isa) != nullptr; }

}  // namespace fastgen
