"""There are no FP8 parameters, so nothing here is called."""

post_all_gather_processing = replace_raw_data = cast_master_weights_to_fp8 = None
