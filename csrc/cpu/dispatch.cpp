#include <string.h>

#include <initializer_list>

#include "kernels.h"

namespace fastgen {
namespace {

#if defined(FASTGEN_X86)
CpuKernels with_multiplier(const char* isa, const Multiplier& multiplier) {
    CpuKernels table = avx512::kernels;
    table.isa = isa;
    table.multiplier_bf16 = &multiplier;
    return table;
}
#endif

const CpuKernels* find(const char* isa) {
#if defined(FASTGEN_X86)
    if (strcmp(isa, "amx") == 0 && find("avx512_bf16") && amx::is_permitted()) {
        static const CpuKernels table = with_multiplier("amx", amx::multiplier);
        return &table;
    }
    if (strcmp(isa, "avx512_bf16") == 0 && find("avx512") && __builtin_cpu_supports("avx512bf16")) {
        static const CpuKernels table = with_multiplier("avx512_bf16", avx512_bf16::multiplier);
        return &table;
    }
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
    for (const char* isa : {"amx", "avx512_bf16", "avx512", "avx2"})
        if (const CpuKernels* table = find(isa)) return table;
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
