/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The layout of every structure of the interface, written down by hand: LAYOUT
 * lists name and size, FIELD each member with offset and size, in order. Sizes
 * and offsets are those of a 32-bit caller as well, because every member is
 * aligned to its own size (header.c checks that from these numbers, for those
 * without a 32-bit compiler).
 */
#define LAYOUT_OF_PMSKB(STRUCT, FIELD) \
	STRUCT(pmskb_desc, 48) \
		FIELD(pmskb_desc, offset, 0, 8) \
		FIELD(pmskb_desc, len, 8, 4) \
		FIELD(pmskb_desc, token, 12, 4) \
		FIELD(pmskb_desc, store, 16, 4) \
		FIELD(pmskb_desc, flags, 20, 4) \
		FIELD(pmskb_desc, time, 24, 8) \
		FIELD(pmskb_desc, seq, 32, 4) \
		FIELD(pmskb_desc, pkt_len, 36, 4) \
		FIELD(pmskb_desc, pkt_off, 40, 4) \
		FIELD(pmskb_desc, csum, 44, 2) \
		FIELD(pmskb_desc, csum_kind, 46, 1) \
		FIELD(pmskb_desc, time_source, 47, 1) \
	STRUCT(pmskb_token_range, 8) \
		FIELD(pmskb_token_range, first, 0, 4) \
		FIELD(pmskb_token_range, count, 4, 4) \
	STRUCT(pmskb_send, 24) \
		FIELD(pmskb_send, fd, 0, 4) \
		FIELD(pmskb_send, reserved, 4, 4) \
		FIELD(pmskb_send, offset, 8, 8) \
		FIELD(pmskb_send, len, 16, 8) \
	STRUCT(pmskb_ext, 16) \
		FIELD(pmskb_ext, token, 0, 4) \
		FIELD(pmskb_ext, offset, 4, 4) \
		FIELD(pmskb_ext, len, 8, 4) \
		FIELD(pmskb_ext, reserved, 12, 4) \
	STRUCT(pmskb_op, 64) \
		FIELD(pmskb_op, opcode, 0, 2) \
		FIELD(pmskb_op, flags, 2, 2) \
		FIELD(pmskb_op, fd, 4, 4) \
		FIELD(pmskb_op, key, 8, 8) \
		FIELD(pmskb_op, key_len, 16, 4) \
		FIELD(pmskb_op, nr_extents, 20, 4) \
		FIELD(pmskb_op, extents, 24, 8) \
		FIELD(pmskb_op, seq, 32, 8) \
		FIELD(pmskb_op, reserved, 40, 24) \
	STRUCT(pmskb_result, 16) \
		FIELD(pmskb_result, res, 0, 8) \
		FIELD(pmskb_result, flags, 8, 4) \
		FIELD(pmskb_result, csum, 12, 2) \
		FIELD(pmskb_result, csum_kind, 14, 1) \
		FIELD(pmskb_result, reserved, 15, 1) \
	STRUCT(pmskb_submit, 32) \
		FIELD(pmskb_submit, ops, 0, 8) \
		FIELD(pmskb_submit, results, 8, 8) \
		FIELD(pmskb_submit, nr, 16, 4) \
		FIELD(pmskb_submit, flags, 20, 4) \
		FIELD(pmskb_submit, reserved, 24, 8) \
	STRUCT(pmskb_uring, 16) \
		FIELD(pmskb_uring, arg, 0, 8) \
		FIELD(pmskb_uring, reserved, 8, 8) \
	STRUCT(pmskb_quota, 16) \
		FIELD(pmskb_quota, frames, 0, 4) \
		FIELD(pmskb_quota, tokens, 4, 4) \
		FIELD(pmskb_quota, reserved, 8, 8) \
	STRUCT(pmskb_counters, 144) \
		FIELD(pmskb_counters, placed, 0, 8) \
		FIELD(pmskb_counters, placed_bytes, 8, 8) \
		FIELD(pmskb_counters, unplaced, 16, 56) \
		FIELD(pmskb_counters, copied_bytes, 72, 8) \
		FIELD(pmskb_counters, derived, 80, 8) \
		FIELD(pmskb_counters, hardware, 88, 8) \
		FIELD(pmskb_counters, computed, 96, 8) \
		FIELD(pmskb_counters, computed_bytes, 104, 8) \
		FIELD(pmskb_counters, mismatch, 112, 8) \
		FIELD(pmskb_counters, refused, 120, 8) \
		FIELD(pmskb_counters, logged_bytes, 128, 8) \
		FIELD(pmskb_counters, heads_in_dram, 136, 8) \
	STRUCT(pmskb_sock_info, 168) \
		FIELD(pmskb_sock_info, store, 0, 4) \
		FIELD(pmskb_sock_info, rx_mode, 4, 4) \
		FIELD(pmskb_sock_info, tokens, 8, 4) \
		FIELD(pmskb_sock_info, frames, 12, 4) \
		FIELD(pmskb_sock_info, quota_frames, 16, 4) \
		FIELD(pmskb_sock_info, quota_tokens, 20, 4) \
		FIELD(pmskb_sock_info, counters, 24, 144) \
	STRUCT(pmskb_format, 96) \
		FIELD(pmskb_format, fd, 0, 4) \
		FIELD(pmskb_format, flags, 4, 4) \
		FIELD(pmskb_format, uuid, 8, 16) \
		FIELD(pmskb_format, label, 24, 32) \
		FIELD(pmskb_format, head_bytes, 56, 8) \
		FIELD(pmskb_format, reserved, 64, 32) \
	STRUCT(pmskb_attach, 32) \
		FIELD(pmskb_attach, fd, 0, 4) \
		FIELD(pmskb_attach, flags, 4, 4) \
		FIELD(pmskb_attach, minor, 8, 4) \
		FIELD(pmskb_attach, reserved, 12, 4) \
		FIELD(pmskb_attach, uuid, 16, 16) \
	STRUCT(pmskb_detach, 16) \
		FIELD(pmskb_detach, minor, 0, 4) \
		FIELD(pmskb_detach, timeout_ms, 4, 4) \
		FIELD(pmskb_detach, reserved, 8, 8) \
	STRUCT(pmskb_open, 64) \
		FIELD(pmskb_open, key, 0, 8) \
		FIELD(pmskb_open, key_len, 8, 4) \
		FIELD(pmskb_open, flags, 12, 4) \
		FIELD(pmskb_open, seq, 16, 8) \
		FIELD(pmskb_open, fd, 24, 4) \
		FIELD(pmskb_open, csum, 28, 2) \
		FIELD(pmskb_open, csum_kind, 30, 1) \
		FIELD(pmskb_open, time_source, 31, 1) \
		FIELD(pmskb_open, len, 32, 8) \
		FIELD(pmskb_open, time, 40, 8) \
		FIELD(pmskb_open, reserved, 48, 16) \
	STRUCT(pmskb_alloc, 32) \
		FIELD(pmskb_alloc, len, 0, 8) \
		FIELD(pmskb_alloc, fd, 8, 4) \
		FIELD(pmskb_alloc, flags, 12, 4) \
		FIELD(pmskb_alloc, reserved, 16, 16) \
	STRUCT(pmskb_store_info, 488) \
		FIELD(pmskb_store_info, uuid, 0, 16) \
		FIELD(pmskb_store_info, label, 16, 32) \
		FIELD(pmskb_store_info, minor, 48, 4) \
		FIELD(pmskb_store_info, flags, 52, 4) \
		FIELD(pmskb_store_info, region_len, 56, 8) \
		FIELD(pmskb_store_info, map_len, 64, 8) \
		FIELD(pmskb_store_info, head_off, 72, 8) \
		FIELD(pmskb_store_info, head_len, 80, 8) \
		FIELD(pmskb_store_info, data_off, 88, 8) \
		FIELD(pmskb_store_info, frames_total, 96, 8) \
		FIELD(pmskb_store_info, frames_free, 104, 8) \
		FIELD(pmskb_store_info, frames_payload, 112, 8) \
		FIELD(pmskb_store_info, frames_record, 120, 8) \
		FIELD(pmskb_store_info, frames_list, 128, 8) \
		FIELD(pmskb_store_info, frames_index, 136, 8) \
		FIELD(pmskb_store_info, frames_held, 144, 8) \
		FIELD(pmskb_store_info, frames_limbo, 152, 8) \
		FIELD(pmskb_store_info, frames_bad, 160, 8) \
		FIELD(pmskb_store_info, frames_reserve, 168, 8) \
		FIELD(pmskb_store_info, heads_total, 176, 8) \
		FIELD(pmskb_store_info, heads_free, 184, 8) \
		FIELD(pmskb_store_info, records, 192, 8) \
		FIELD(pmskb_store_info, keys, 200, 8) \
		FIELD(pmskb_store_info, live_bytes, 208, 8) \
		FIELD(pmskb_store_info, record_bytes, 216, 8) \
		FIELD(pmskb_store_info, fragmented_bytes, 224, 8) \
		FIELD(pmskb_store_info, reclaimable_bytes, 232, 8) \
		FIELD(pmskb_store_info, trunc_seq, 240, 8) \
		FIELD(pmskb_store_info, moved_records, 248, 8) \
		FIELD(pmskb_store_info, moved_bytes, 256, 8) \
		FIELD(pmskb_store_info, durable_seq, 264, 8) \
		FIELD(pmskb_store_info, sockets, 272, 8) \
		FIELD(pmskb_store_info, tokens, 280, 8) \
		FIELD(pmskb_store_info, lines_flushed, 288, 8) \
		FIELD(pmskb_store_info, fences, 296, 8) \
		FIELD(pmskb_store_info, submits, 304, 8) \
		FIELD(pmskb_store_info, counters, 312, 144) \
		FIELD(pmskb_store_info, frames_sockets, 456, 8) \
		FIELD(pmskb_store_info, quota_store_frames, 464, 8) \
		FIELD(pmskb_store_info, quota_socket_frames, 472, 8) \
		FIELD(pmskb_store_info, quota_socket_tokens, 480, 8) \
	STRUCT(pmskb_compact, 48) \
		FIELD(pmskb_compact, from, 0, 8) \
		FIELD(pmskb_compact, steps, 8, 4) \
		FIELD(pmskb_compact, done, 12, 4) \
		FIELD(pmskb_compact, records, 16, 8) \
		FIELD(pmskb_compact, bytes, 24, 8) \
		FIELD(pmskb_compact, reserved, 32, 16) \
	STRUCT(pmskb_scrub_bad, 16) \
		FIELD(pmskb_scrub_bad, seq, 0, 8) \
		FIELD(pmskb_scrub_bad, error, 8, 4) \
		FIELD(pmskb_scrub_bad, reserved, 12, 4) \
	STRUCT(pmskb_scrub, 64) \
		FIELD(pmskb_scrub, from, 0, 8) \
		FIELD(pmskb_scrub, max_bytes, 8, 8) \
		FIELD(pmskb_scrub, bad, 16, 8) \
		FIELD(pmskb_scrub, nr_bad, 24, 4) \
		FIELD(pmskb_scrub, done, 28, 4) \
		FIELD(pmskb_scrub, records, 32, 8) \
		FIELD(pmskb_scrub, bytes, 40, 8) \
		FIELD(pmskb_scrub, reserved, 48, 16)
