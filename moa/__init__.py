"""MoA: adapters, routers and the methods that combine them. `moa.config` needs no torch; import the rest by module."""
