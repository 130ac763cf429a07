#include "layout.h"

#include "testing.h"

namespace fastgen::testing {
namespace {

Shape shape_of(const Sizes& sizes, const std::vector<Sizes>& strides, bool ordered, bool per_sample,
               std::vector<Tensor>& tensors) {
    int64_t table[2][kMaxRank];
    tensors.resize(strides.size());
    std::vector<Tensor*> pointers;
    for (size_t t = 0; t < strides.size(); ++t) {
        std::copy(strides[t].begin(), strides[t].end(), table[t]);
        pointers.push_back(&tensors[t]);
    }
    Shape shape{};
    CHECK(coalesce(shape, int(sizes.size()), sizes.data(), int(strides.size()), table,
                   pointers.data(), ordered, per_sample));
    return shape;
}

TEST(a_contiguous_tensor_is_one_dimension) {
    std::vector<Tensor> tensors;
    const Shape shape = shape_of({2, 3, 4}, {{12, 4, 1}}, true, true, tensors);
    CHECK(shape.batch == 2 && shape.elements == 12 && shape.ndim == 1 && shape.size[0] == 12);
    CHECK(tensors[0].batch_stride == 12 && tensors[0].stride[0] == 1);
}

TEST(the_batch_is_folded_in_where_samples_do_not_matter) {
    std::vector<Tensor> tensors;
    const Shape shape = shape_of({2, 3, 4}, {{12, 4, 1}}, false, false, tensors);
    CHECK(shape.batch == 1 && shape.elements == 24 && shape.ndim == 1);
}

TEST(channels_last_is_one_dimension_where_the_order_does_not_matter) {
    std::vector<Tensor> tensors;
    const Sizes sizes = {2, 3, 4, 5}, channels_last = {60, 1, 15, 3};
    CHECK(shape_of(sizes, {channels_last, channels_last}, false, false, tensors).ndim == 1);
    CHECK(shape_of(sizes, {channels_last}, true, true, tensors).ndim == 2);
}

TEST(a_scalar_and_sizes_of_one_have_one_dimension) {
    std::vector<Tensor> tensors;
    const Shape scalar = shape_of({}, {{}}, true, true, tensors);
    CHECK(scalar.batch == 1 && scalar.elements == 1 && scalar.ndim == 1 && scalar.size[0] == 1);
    const Shape ones = shape_of({3, 1, 1}, {{7, 5, 9}}, true, true, tensors);
    CHECK(ones.batch == 3 && ones.elements == 1 && ones.ndim == 1);
    CHECK(tensors[0].batch_stride == 7);
}

TEST(more_than_eight_separate_dimensions_are_refused) {
    Sizes sizes(10, 2);
    int64_t strides[1][kMaxRank];
    for (int dim = 0; dim < 10; ++dim) strides[0][dim] = int64_t{3} << (2 * (9 - dim));
    Tensor tensor{};
    Tensor* tensors[] = {&tensor};
    Shape shape{};
    CHECK(!coalesce(shape, 10, sizes.data(), 1, strides, tensors, true, true));
}

}  // namespace
}  // namespace fastgen::testing
