// Streams besides the one that a call runs on, for work of the call that may run at once.
#pragma once

namespace fastlstm {
namespace cuda {

// One of the streams for work of a call on `stream`. Each is of the current device, of the calling
// thread alone, and created when the thread first asks for it. Calls that a CUDA graph records have
// others than calls that run.
void* forked_stream(void* stream, int index);

// What `stream` gets from now on runs after all that `other` has got so far. In a CUDA graph that
// records `other`, `stream` is recorded as well, until that graph ends.
void follow(void* stream, void* other);

}  // namespace cuda
}  // namespace fastlstm
