"""Families of losses: from a checked call to a problem of `kernels.spec`. None knows a device."""
