"""The science: roles, rules and the resolved table. Imports neither torch nor megatron."""
