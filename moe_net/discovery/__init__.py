"""Who is there: signed, expiring peer records behind the Discovery protocol."""
