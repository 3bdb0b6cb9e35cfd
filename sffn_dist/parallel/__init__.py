"""Who holds what: topology, collectives, the structured parallel linears, the host without CUDA."""
