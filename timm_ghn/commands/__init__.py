"""The sub-commands of ``timm-ghn``, a module each."""
