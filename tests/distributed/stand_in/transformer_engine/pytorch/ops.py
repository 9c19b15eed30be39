"""Names that Megatron's annotations mention; nothing here is used."""


class Sequential: ...


class FusibleOperation: ...
