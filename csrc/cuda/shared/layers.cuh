// The order in which a stack's layers and their steps run.
//
// Layers usually run one after the other, each all of its steps. Where a layer leaves most SMs
// idle, several work at once: steps are divided into chunks, and a layer works on one chunk while
// the layer that reads its results works on the chunk before. Each layer then has a stream, the
// first one the call's own, and memory that no other layer writes. On its stream a layer's chunks
// follow each other, hence may hand on states in place; a chunk waits for the same chunk of the
// layer whose results it reads, and the call's stream, at the end, for the last chunk of the last
// layer, behind which there is nothing. So the call's stream needs no other waits, and nothing
// outlives the call. A CUDA graph records all of the streams.
#pragma once

#include "stack.cuh"

namespace fastlstm {
namespace cuda {

// The streams of layers that work at once, by the order in which layers begin.
template <class S>
class LayerStreams {
 public:
  explicit LayerStreams(Stack<S>& stack) : stack_(stack) {
    streams_.push_back(stack.stream());
    if (!stack.at_once()) return;
    for (int j = 1; j < stack.problem.layers; ++j)
      streams_.push_back(forked_stream(streams_[0], j - 1));
  }
  LayerStreams(const LayerStreams&) = delete;
  LayerStreams& operator=(const LayerStreams&) = delete;
  // Where a launch or a product has thrown, what runs may still use the call's memory.
  ~LayerStreams() {
    stack_.set_stream(streams_[0]);
    if (joined_) return;
    for (size_t j = 1; j < streams_.size(); ++j) try {
        follow(streams_[0], streams_[j]);
      } catch (const std::exception&) {
      }
  }

  // What follows is the j-th layer's, in a chunk in which the layer before it has been issued.
  void begin(int j) {
    if (streams_.size() == 1) return;
    if (j > 0) follow(streams_[j], streams_[j - 1]);
    stack_.set_stream(streams_[j]);
  }
  void join() {
    if (streams_.size() > 1) follow(streams_[0], streams_.back());
    joined_ = true;
  }

 private:
  Stack<S>& stack_;
  std::vector<void*> streams_;
  bool joined_ = false;
};

// Calls work(layer, steps) for every layer and chunk, with the stack's stream set to the layer's.
// Backward begins with the last layer and the last chunk.
template <class S, class Work>
void for_layers(Stack<S>& stack, Pass pass, Work&& work) {
  const int layers = stack.problem.layers;
  const int64_t chunks = stack.chunks();
  const bool forward = pass == Pass::forward;
  LayerStreams<S> streams(stack);
  for (int64_t k = 0; k < chunks; ++k)
    for (int j = 0; j < layers; ++j) {
      streams.begin(j);
      work(forward ? j : layers - 1 - j, stack.chunk(forward ? k : chunks - 1 - k));
    }
  streams.join();
}

}  // namespace cuda
}  // namespace fastlstm
