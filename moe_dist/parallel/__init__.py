"""Who I am: launcher environment, device, process groups, collectives."""
