// What the native tests share: TEST and CHECK, random tensors of any layout, and a loop over the
// instruction sets.
#pragma once

#include <stdint.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "math/convert.h"

namespace fastgen::testing {

struct Test {
    Test(const char* name, void (*run)());
};

[[noreturn]] void fail(const char* file, int line, const char* what);

#define TEST(name)                                            \
    static void name();                                       \
    static ::fastgen::testing::Test test_##name(#name, name); \
    static void name()
#define CHECK(condition) \
    if (!(condition)) ::fastgen::testing::fail(__FILE__, __LINE__, #condition)

using Random = std::mt19937_64;

// Uniform over [low, high].
int64_t pick(Random& random, int64_t low, int64_t high);

// Calls visit for each set of kernels that this processor has, widest last.
void for_each_isa(const std::function<void(const CpuKernels&)>& visit);
// The same, with those that differ in products of bfloat16 alone.
void for_each_product(const std::function<void(const CpuKernels&)>& visit);

using Sizes = std::vector<int64_t>;

// A tensor on its own heap block of exactly the size that its layout spans, so that the address
// sanitizer sees every access outside it.
class Array {
   public:
    enum class Layout { kContiguous, kPermuted, kPadded, kExpanded };

    Array() = default;
    Array(Sizes sizes, DType dtype, Layout layout, Random& random);
    Array copy() const;

    bool given() const { return bool(memory_); }
    int64_t elements() const;  // logical
    int64_t slots() const { return slots_; }
    const Sizes& sizes() const { return sizes_; }
    const Sizes& strides() const { return strides_; }
    DType dtype() const { return dtype_; }
    void* data() const { return memory_.get(); }

    // Where the `index`-th element, row-major over the sizes, lies.
    int64_t slot(int64_t index) const;
    float at(int64_t index) const { return read(slot(index)); }
    void set(int64_t index, float value) { write(slot(index), value); }
    float read(int64_t slot) const;
    void write(int64_t slot, float value);
    // A mixture of ordinary values with zeros, denormals, infinities and NaN.
    void fill(Random& random);
    void fill_ordinary(Random& random);

   private:
    Sizes sizes_, strides_;
    DType dtype_ = kFloat32;
    int64_t slots_ = 0;
    std::shared_ptr<char[]> memory_;
};

Array::Layout any_layout(Random& random, bool output);
DType any_dtype(Random& random);

// Bit for bit over all slots, the gaps of the layout included; any NaN equals any NaN.
bool same(const Array& a, const Array& b);

// Lays `arrays` out over one shape, as csrc/module.cpp does; false where coalesce refuses.
bool lay_out(Shape& shape, const std::vector<std::pair<Tensor*, const Array*>>& arrays,
             const Sizes& sizes, bool ordered, bool per_sample);

// The `element`-th normal of the noise contract.
float normal(uint64_t seed, int64_t sample_id, uint32_t step, uint32_t stream, int64_t element);

// The sum by the reduction tree: chunks of kChunk by halves, until one value is left.
float tree_sum(std::vector<float> values);

}  // namespace fastgen::testing
