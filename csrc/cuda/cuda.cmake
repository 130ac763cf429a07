# The CUDA kernels as the target cuda_kernels, where a working nvcc is found; a line says which.
# CMAKE_CUDA_ARCHITECTURES overrides the architectures; FASTGEN_CUDA=OFF leaves CUDA out.
option(FASTGEN_CUDA "Build the CUDA kernels where nvcc is found" ON)
if(NOT FASTGEN_CUDA)
  message(STATUS "fastgen: without CUDA (FASTGEN_CUDA is off)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)  # compiles a program: a broken nvcc or a host compiler it refuses shows here
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "fastgen: without CUDA (no nvcc that works with this C++ compiler; see "
                 "CMakeFiles/CMakeError.log or CMakeConfigureLog.yaml, or set CUDACXX, CUDAHOSTCXX)")
  return()
endif()
# Before CMake would choose, and remember, the compiler's own default.
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known_codes)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
  if(known_codes MATCHES "sm_100")
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit)
if(NOT TARGET CUDA::cudart_static OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(STATUS "fastgen: without CUDA (needs CUDA 12 or later with cudart_static, found nvcc "
                 "${CMAKE_CUDA_COMPILER_VERSION})")
  return()
endif()

add_library(cuda_kernels OBJECT csrc/cuda/step.cu csrc/cuda/reparameterize.cu
                                csrc/cuda/guidance.cu csrc/cuda/conv_transpose.cu)
set_target_properties(cuda_kernels PROPERTIES
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)
# The bits that every backend promises; --use_fast_math must never join them.
target_compile_options(cuda_kernels PRIVATE
  -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false --threads=2)
list(JOIN CMAKE_CUDA_ARCHITECTURES "," cuda_architectures)
message(STATUS "fastgen: CUDA kernels for ${cuda_architectures} by nvcc "
               "${CMAKE_CUDA_COMPILER_VERSION}")
