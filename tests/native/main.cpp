#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "layout.h"
#include "math/normal.h"
#include "math/philox.h"
#include "testing.h"

namespace fastgen::testing {
namespace {

struct Entry {
    const char* name;
    void (*run)();
};

std::vector<Entry>& entries() {
    static std::vector<Entry> all;
    return all;
}

int64_t bytes_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace

Test::Test(const char* name, void (*run)()) { entries().push_back({name, run}); }

void fail(const char* file, int line, const char* what) {
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    exit(1);
}

int64_t pick(Random& random, int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
}

void for_each_isa(const std::function<void(const CpuKernels&)>& visit) {
    for (const char* isa : {"baseline", "avx2", "avx512"})
        if (choose_cpu_kernels(isa)) visit(cpu_kernels());
}

void for_each_product(const std::function<void(const CpuKernels&)>& visit) {
    for_each_isa(visit);
    for (const char* isa : {"avx512_bf16", "amx"})
        if (choose_cpu_kernels(isa)) visit(cpu_kernels());
}

Array::Layout any_layout(Random& random, bool output) {
    return Array::Layout(pick(random, 0, output ? 2 : 3));
}

DType any_dtype(Random& random) { return DType(pick(random, 0, 2)); }

Array::Array(Sizes sizes, DType dtype, Layout layout, Random& random)
    : sizes_(std::move(sizes)), strides_(sizes_.size()), dtype_(dtype) {
    const int rank = int(sizes_.size());
    std::vector<int> order(rank);
    std::iota(order.begin(), order.end(), 0);
    if (layout == Layout::kPermuted) std::shuffle(order.begin(), order.end(), random);
    int64_t extent = 1;
    for (int i = rank - 1; i >= 0; --i) {
        const int dim = order[i];
        if (layout == Layout::kExpanded && pick(random, 0, 1)) continue;  // stride 0
        strides_[dim] = extent;
        extent *= std::max<int64_t>(sizes_[dim], 1);
        if (layout == Layout::kPadded) extent += pick(random, 0, 3);
    }
    slots_ = 1;
    for (int dim = 0; dim < rank; ++dim)
        slots_ += std::max<int64_t>(sizes_[dim] - 1, 0) * strides_[dim];
    memory_.reset(new char[slots_ * bytes_of(dtype)]);
    fill(random);
}

Array Array::copy() const {
    Array result = *this;
    result.memory_.reset(new char[slots_ * bytes_of(dtype_)]);
    memcpy(result.data(), data(), slots_ * bytes_of(dtype_));
    return result;
}

int64_t Array::elements() const {
    return std::accumulate(sizes_.begin(), sizes_.end(), int64_t{1}, std::multiplies<>());
}

int64_t Array::slot(int64_t index) const {
    int64_t result = 0;
    for (int dim = int(sizes_.size()) - 1; dim >= 0; --dim) {
        result += index % sizes_[dim] * strides_[dim];
        index /= sizes_[dim];
    }
    return result;
}

float Array::read(int64_t slot) const {
    if (dtype_ == kFloat32) return static_cast<const float*>(data())[slot];
    if (dtype_ == kBFloat16)
        return baseline::to_float(static_cast<const baseline::bfloat16*>(data())[slot]);
    return baseline::to_float(static_cast<const baseline::float16*>(data())[slot]);
}

void Array::write(int64_t slot, float value) {
    if (dtype_ == kFloat32)
        static_cast<float*>(data())[slot] = value;
    else if (dtype_ == kBFloat16)
        baseline::from_float(value, static_cast<baseline::bfloat16*>(data())[slot]);
    else
        baseline::from_float(value, static_cast<baseline::float16*>(data())[slot]);
}

void Array::fill(Random& random) {
    const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 0x1p-140f, 0x1p-20f, 6e4f};
    std::normal_distribution<float> ordinary;
    for (int64_t i = 0; i < slots_; ++i)
        write(i, pick(random, 0, 15) ? ordinary(random) : special[pick(random, 0, 7)]);
}

void Array::fill_ordinary(Random& random) {
    std::normal_distribution<float> ordinary;
    for (int64_t i = 0; i < slots_; ++i) write(i, ordinary(random));
}

bool same(const Array& a, const Array& b) {
    if (a.slots() != b.slots() || a.dtype() != b.dtype()) return false;
    for (int64_t i = 0; i < a.slots(); ++i) {
        const float x = a.read(i), y = b.read(i);
        const bool equal = baseline::float_bits(x) == baseline::float_bits(y);
        if (!equal && !(isnan(x) && isnan(y))) {
            fprintf(stderr, "slot %lld of %lld: %a and %a\n", (long long)i, (long long)a.slots(), x,
                    y);
            return false;
        }
    }
    return true;
}

bool lay_out(Shape& shape, const std::vector<std::pair<Tensor*, const Array*>>& arrays,
             const Sizes& sizes, bool ordered, bool per_sample) {
    const int rank = int(sizes.size());
    int64_t strides[24][kMaxRank];
    CHECK(arrays.size() <= 24);
    std::vector<Tensor*> tensors;
    for (const auto& [tensor, array] : arrays) {
        tensor->data = array->data();
        tensor->dtype = array->dtype();
        std::copy(array->strides().begin(), array->strides().end(), strides[tensors.size()]);
        tensors.push_back(tensor);
    }
    return coalesce(shape, rank, sizes.data(), int(tensors.size()), strides, tensors.data(),
                    ordered, per_sample);
}

float normal(uint64_t seed, int64_t sample_id, uint32_t step, uint32_t stream, int64_t element) {
    uint32_t words[4] = {uint32_t(element / 4), step << 8 | stream, uint32_t(sample_id),
                         uint32_t(uint64_t(sample_id) >> 32)};
    baseline::philox4x32(words, uint32_t(seed), uint32_t(seed >> 32));
    float z[4];
    baseline::box_muller(words[0], words[1], z[0], z[1]);
    baseline::box_muller(words[2], words[3], z[2], z[3]);
    return z[element % 4];
}

float tree_sum(std::vector<float> values) {
    do {
        values.resize((values.size() + kChunk - 1) / kChunk * kChunk, 0.0f);
        std::vector<float> sums;
        for (size_t start = 0; start < values.size(); start += kChunk) {
            for (int64_t half = kChunk / 2; half >= 1; half /= 2)
                for (int64_t i = 0; i < half; ++i) values[start + i] += values[start + i + half];
            sums.push_back(values[start]);
        }
        values = sums;
    } while (values.size() > 1);
    return values[0];
}

}  // namespace fastgen::testing

// native_tests [part of a name]
int main(int argc, char** argv) {
    using Clock = std::chrono::steady_clock;
    fastgen::testing::for_each_product(
        [](const fastgen::CpuKernels& kernels) { printf("instruction set: %s\n", kernels.isa); });
    int count = 0;
    for (const auto& test : fastgen::testing::entries()) {
        if (argc > 1 && !strstr(test.name, argv[1])) continue;
        const auto start = Clock::now();
        test.run();
        const std::chrono::duration<double> taken = Clock::now() - start;
        printf("%-72s %6.2f s\n", test.name, taken.count());
        fflush(stdout);
        ++count;
    }
    printf("%d native tests passed\n", count);
    return count ? 0 : 1;
}
