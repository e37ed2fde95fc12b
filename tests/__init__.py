"""The tests of megatron_ep_v2: a package, so that rank processes can import what they are to run."""
