// act(scale (v + bias) + shift), the activation chosen outside of the loop over elements.
#pragma once

#include "../math/activation.h"
#include "../params.h"

namespace fastgen::FASTGEN_ISA {

// Functions as arguments: a switch outside the loop, and a loop that vectorises inside.
template <typename Body>
FASTGEN_INLINE void with_activation(const Epilogue& e, const Body& body) {
    const float slope = e.negative_slope;
    switch (e.activation) {
        case kIdentity:
            return body([](float x) { return x; });
        case kRelu:
            return body([](float x) { return x < 0.0f ? 0.0f : x; });
        case kLeakyRelu:
            return body([=](float x) { return x < 0.0f ? x * slope : x; });
        case kTanh:
            return body([](float x) { return tanh_any(x); });
        case kSigmoid:
            return body([](float x) { return sigmoid(x); });
        case kSilu:
            return body([](float x) { return silu(x); });
        case kGelu:
            return body([](float x) { return gelu(x); });
    }
}

}  // namespace fastgen::FASTGEN_ISA
