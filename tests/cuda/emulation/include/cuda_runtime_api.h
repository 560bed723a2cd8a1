#pragma once

using cudaError_t = int;
using cudaStream_t = void*;
