"""fastgen's samplers under the names and signatures of other libraries."""
