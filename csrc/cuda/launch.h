// Entry points of the CUDA kernels: each runs on `stream` (a cudaStream_t) and returns a
// cudaError_t.
#pragma once

#include "../params.h"

namespace fastgen::cuda {

int step(const StepParams&, void* stream);
int reparameterize(const ReparameterizeParams&, void* stream);
int reparameterize_backward(const ReparameterizeParams&, void* stream);
int rescale(const RescaleParams&, void* stream);
int conv_transpose(const DirectConvTransposeParams&, void* stream);
// Whether the current device and driver can run these kernels at all.
int probe();
int current_device();  // or -1
const char* error_string(int error);

}  // namespace fastgen::cuda
