// From tensors of any strides to the fewest dims that describe them all.
#pragma once

#include "params.h"

namespace fastgen {

constexpr int kMaxRank = 64;

// Fills `shape` and the strides of the tensors. Unless `ordered`, dims may be walked in the order
// of the first tensor's memory; unless `per_sample`, the batch is one more dim of a single sample.
// False where more than kMaxDims remain.
inline bool coalesce(Shape& shape, int rank, const int64_t* size, int count,
                     const int64_t (*stride)[kMaxRank], Tensor* const* tensors, bool ordered,
                     bool per_sample) {
    const int first = per_sample && rank > 0 ? 1 : 0;
    shape.batch = first ? size[0] : 1;
    shape.elements = 1;
    int dims[kMaxRank];
    int kept = 0;
    for (int dim = first; dim < rank; ++dim) {
        shape.elements *= size[dim];
        if (size[dim] != 1) dims[kept++] = dim;
    }
    if (!ordered && count > 0)  // insertion sort, largest stride of the first tensor outermost
        for (int i = 1; i < kept; ++i)
            for (int j = i; j > 0 && stride[0][dims[j]] > stride[0][dims[j - 1]]; --j) {
                const int swapped = dims[j];
                dims[j] = dims[j - 1];
                dims[j - 1] = swapped;
            }
    // Merge from the innermost dim outwards wherever every tensor's strides allow it.
    int64_t merged_size[kMaxRank];
    int inner_dim[kMaxRank];  // whose strides a merged dim has
    int merged = 0;
    for (int i = kept - 1; i >= 0; --i) {
        bool joins = merged > 0;
        for (int t = 0; joins && t < count; ++t)
            joins =
                stride[t][dims[i]] == stride[t][inner_dim[merged - 1]] * merged_size[merged - 1];
        if (joins) {
            merged_size[merged - 1] *= size[dims[i]];
        } else {
            merged_size[merged] = size[dims[i]];
            inner_dim[merged++] = dims[i];
        }
    }
    if (merged > kMaxDims) return false;
    shape.ndim = merged > 0 ? merged : 1;
    for (int d = 0; d < merged; ++d) shape.size[d] = merged_size[merged - 1 - d];
    if (merged == 0) shape.size[0] = 1;
    for (int t = 0; t < count; ++t) {
        tensors[t]->batch_stride = first ? stride[t][0] : 0;
        for (int d = 0; d < merged; ++d)
            tensors[t]->stride[d] = stride[t][inner_dim[merged - 1 - d]];
        if (merged == 0) tensors[t]->stride[0] = 1;
    }
    return true;
}

}  // namespace fastgen
