"""Tables as files: what each shows and which runs it needs, made, resumed, shared between processes, and checked."""
