"""The tensor operations behind `fastunlearn.functional`, which is the public, checked face of this folder.

* `definition`: what each operation computes, in plain torch, to be read and to test against.
* `arguments`, `spatial_masks`: checks of what a caller passed, and masks at the resolution of a tensor.
* `dispatch`: which backend runs an operation. `torch_backend` is one; the Triton kernels are in `fastunlearn.kernels`.
* `localization`: layers of any kind as calls of a backend. `sharded`: losses over a process group.
* `once_differentiable`: gradients that raise if they are differentiated again.
"""
