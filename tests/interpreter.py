"""Triton's interpreter, which runs the kernels where there is no GPU."""

import importlib.util
import inspect
import os

import numpy as np


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
    semantic = interpreter.interpreter_semantic  # not its class, which is the compiler's, too
    semantic.binary_op_type_checking_impl = _operands_by_their_types(semantic.binary_op_type_checking_impl)
    semantic.broadcast_impl_value = _broadcasts_by_their_types(semantic, interpreter.TensorHandle)


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
    """`_patch_builtin`, which looks through all that a package holds at each launch, and wraps each function in it."""
    found, semantic = {}, interpreter.interpreter_semantic

    def for_the_interpreter(function):
        function = inspect.unwrap(function)  # of what asks whether it is told the semantic

        def run(*args, **named):
            named["_semantic"] = semantic
            return function(*args, **named)

        return run

    def patch_builtin(package, builder, scope):
        if package not in found:
            members = [(name, one) for name, one in inspect.getmembers(package) if interpreter.tl.core.is_builtin(one)]
            found[package] = [(name, for_the_interpreter(one)) for name, one in members]
        for name, function in found[package]:
            scope.set_attr(package, name, function)

    return patch_builtin


def _make_shapes_once(core):
    """Let types and tensors of one shape share what is checked and wrapped for it: a fifth of the time goes there."""
    new_type, new_tensor, types, of_numbers = core.block_type.__init__, core.tensor.__init__, {}, {}

    def block_type(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = vars(self)
        self.__dict__ = types[key]

    def tensor(self, handle, type):
        known = vars(type) if type.is_block() else of_numbers
        if "of_tensors" not in known:
            new_tensor(self, handle, type)
            known["of_tensors"] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known["of_tensors"]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _operands_by_their_types(operands):
    """`binary_op_type_checking_impl`, half of the interpreter's time, with what it did for such operands before.

    It is kept where both stay as they are, and where a whole number becomes a tensor, which nothing ever writes to.
    """
    found = {}

    def operands_of(lhs, rhs, *flags, **named):
        key = (_kind(lhs), _kind(rhs), flags, *named.items())
        if key in found:
            left, right = found[key]
            return lhs if left is None else left, rhs if right is None else right
        given, made = (lhs, rhs), operands(lhs, rhs, *flags, **named)
        pairs = list(zip(given, made, strict=True))
        if None not in key and all([new is old or type(old) is int for old, new in pairs]):
            found[key] = [None if new is old else new for old, new in pairs]
        return made

    return operands_of


def _broadcasts_by_their_types(semantic, handle):
    """`broadcast_impl_value`, which finds out anew what two such tensors become together."""
    broadcast, found = semantic.broadcast_impl_value, {}

    def spread(tensor, to):
        if to is None:
            return tensor
        type, shape = to
        data = np.empty(shape, tensor.handle.data.dtype)
        data[...] = tensor.handle.data
        return semantic.tensor(handle(data, tensor.handle.dtype.scalar), type)

    def broadcast_of(*tensors):
        key = tuple(map(_kind, tensors))
        if key in found:
            return [spread(tensor, to) for tensor, to in zip(tensors, found[key], strict=True)]
        made = broadcast(*tensors)
        pairs = zip(tensors, made, strict=True)
        found[key] = [None if new is old else (new.type, new.handle.data.shape) for old, new in pairs]
        return made

    return broadcast_of


def _kind(operand):
    """What of an operand the result's types depend on, or None where that is not told."""
    if type(operand) is int:
        return int, operand
    kind = getattr(operand, "type", None)  # of a tensor
    if kind is None:
        return None
    return id(vars(kind)) if kind.is_block() else kind.name  # of equal blocks that is shared: see `_make_shapes_once`
