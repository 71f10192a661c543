//! Token buckets, volumes, bounded retry and breakers; pure, time is an argument
