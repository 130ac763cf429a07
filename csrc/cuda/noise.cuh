// Standard normals of a thread's quad: one Philox block for four logical neighbours.
#pragma once

#include "../math/normal.h"
#include "../math/philox.h"
#include "group.cuh"

namespace fastgen::cuda {

class Normals {
   public:
    __device__ __forceinline__ Normals(const NoiseKey& key, int64_t sample) {
        const uint64_t seed = key.seeds ? uint64_t(key.seeds[sample * key.seed_stride]) : key.seed;
        const uint64_t id =
            uint64_t(key.sample_ids ? key.sample_ids[sample] : key.first_sample_id + sample);
        const uint32_t step = key.step + uint32_t(key.step_pointer ? *key.step_pointer : 0);
        key_[0] = uint32_t(seed);
        key_[1] = uint32_t(seed >> 32);
        id_[0] = uint32_t(id);
        id_[1] = uint32_t(id >> 32);
        shifted_step_ = step << 8;
    }

    // exchange: room for a float4 a thread, where lanes hand each other their elements' normals;
    // kStrided alone, and then by whole warps.
    template <Layout kLayout>
    __device__ __forceinline__ void draw(float z[4], const Group<kLayout>& group, int quad,
                                         int32_t stream, float4* exchange) const {
        uint32_t words[4] = {group.block(quad), shifted_step_ | uint32_t(stream), id_[0], id_[1]};
        philox4x32(words, key_[0], key_[1]);
        box_muller(words[0], words[1], z[0], z[1]);
        box_muller(words[2], words[3], z[2], z[3]);
        if constexpr (kLayout == Layout::kStrided) {
            __syncwarp();  // the last draw has been read
            exchange[threadIdx.x] = {z[0], z[1], z[2], z[3]};
            __syncwarp();
            const float* normals = reinterpret_cast<const float*>(exchange);
            for (int i = 0; i < 4; ++i) z[i] = normals[group.place(quad, i)];
        }
    }

   private:
    uint32_t key_[2], id_[2], shifted_step_;
};

}  // namespace fastgen::cuda
