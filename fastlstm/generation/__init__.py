"""Drawing text from a stack and its decoder: ``generate``, ``prepack``, and what they are made of.

``generate`` checks and runs a call; ``packed_weights`` makes what the native sampler reads;
``draw`` chooses tokens in torch, for models that the native sampler does not run.
"""
