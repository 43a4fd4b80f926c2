"""Triton's interpreter, which runs the kernels where there is no GPU."""

import importlib.util
import inspect
import os


def use_interpreter():
    """For this process and what it starts; before any kernel is defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    if not importlib.util.find_spec("triton"):
        return
    from triton.runtime import interpreter

    # Whether an int32 overflows, which no size of these tests can bring about, takes half of its time.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 asks for int() of an array of one number, which NumPy 2.4 does not give any more.
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_builtin = _with_known_builtins(interpreter)
    _make_shapes_once(interpreter.tl.core)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_a_name(interpreter._get_np_dtype)


def _once_a_launch(patch_lang):
    """`patch_lang`, which exchanges what kernels call of Triton, without a part of a kernel doing so at each call."""
    launch, done = None, set()  # what undoes it after the kernel; the modules whose functions see it

    def patch(function):
        nonlocal launch
        seen_by = function.__module__
        if launch is not None and launch._changes:  # not undone yet: it is a part of that kernel that is called
            if seen_by not in done:
                done.add(seen_by)
                patch_lang(function)
            return None
        launch = patch_lang(function)
        done.clear()
        done.add(seen_by)
        return launch

    return patch


def _once_a_name(np_dtype):
    """`np_dtype`, which makes a table of all of Triton's dtypes at each call."""
    found = {}

    def look_up(dtype):
        if dtype.name not in found:
            found[dtype.name] = np_dtype(dtype)
        return found[dtype.name]

    return look_up


def _with_known_builtins(interpreter):
    """`_patch_builtin`, which looks through all that a package holds at each launch."""
    found = {}

    def patch_builtin(package, builder, scope):
        if package not in found:
            members = inspect.getmembers(package)
            found[package] = [(name, member) for name, member in members if interpreter.tl.core.is_builtin(member)]
        for name, member in found[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    return patch_builtin


def _make_shapes_once(core):
    """Let types and tensors of one shape share what is checked and wrapped for it: a fifth of the time goes there."""
    new_type, new_tensor, types, shapes = core.block_type.__init__, core.tensor.__init__, {}, {}

    def block_type(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = vars(self)
        self.__dict__ = types[key]

    def tensor(self, handle, type):
        shape = type.shape if type.is_block() else ()
        if shape not in shapes:
            new_tensor(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
