"""The host-side compiler: from a sparse torch network to an artifact folder."""
