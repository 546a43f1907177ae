"""Types of the compiled module, written by csrc/build_stub.py from uffd_shim.cdef."""

from typing import Any

# A pointer: what ffi.new, ffi.from_buffer and ffi.cast return, or bytes.
CData = Any

ffi: Any

class _Lib:
    UFFD_USER_MODE_ONLY: int
    UFFD_API: int
    UFFD_FEATURE_PAGEFAULT_FLAG_WP: int
    UFFD_FEATURE_EVENT_FORK: int
    UFFD_FEATURE_EVENT_REMAP: int
    UFFD_FEATURE_EVENT_REMOVE: int
    UFFD_FEATURE_MISSING_HUGETLBFS: int
    UFFD_FEATURE_MISSING_SHMEM: int
    UFFD_FEATURE_EVENT_UNMAP: int
    UFFD_FEATURE_SIGBUS: int
    UFFD_FEATURE_THREAD_ID: int
    UFFD_FEATURE_MINOR_HUGETLBFS: int
    UFFD_FEATURE_MINOR_SHMEM: int
    UFFD_FEATURE_EXACT_ADDRESS: int
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM: int
    UFFD_FEATURE_WP_UNPOPULATED: int
    UFFD_FEATURE_POISON: int
    UFFD_FEATURE_WP_ASYNC: int
    UFFD_FEATURE_MOVE: int
    UFFD_FEATURE_RWP: int
    UFFD_FEATURE_RWP_ASYNC: int
    UFFDIO_REGISTER_MODE_MISSING: int
    UFFDIO_REGISTER_MODE_WP: int
    UFFDIO_REGISTER_MODE_MINOR: int
    UFFDIO_REGISTER_MODE_RWP: int
    UFFDIO_COPY_MODE_DONTWAKE: int
    UFFDIO_COPY_MODE_WP: int
    UFFDIO_ZEROPAGE_MODE_DONTWAKE: int
    UFFDIO_WRITEPROTECT_MODE_WP: int
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE: int
    UFFDIO_CONTINUE_MODE_DONTWAKE: int
    UFFDIO_CONTINUE_MODE_WP: int
    UFFDIO_POISON_MODE_DONTWAKE: int
    UFFDIO_MOVE_MODE_DONTWAKE: int
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: int
    UFFDIO_RWPROTECT_MODE_RWP: int
    UFFDIO_RWPROTECT_MODE_DONTWAKE: int
    _UFFDIO_REGISTER: int
    _UFFDIO_UNREGISTER: int
    _UFFDIO_WAKE: int
    _UFFDIO_COPY: int
    _UFFDIO_ZEROPAGE: int
    _UFFDIO_MOVE: int
    _UFFDIO_WRITEPROTECT: int
    _UFFDIO_CONTINUE: int
    _UFFDIO_POISON: int
    _UFFDIO_RWPROTECT: int
    _UFFDIO_SET_MODE: int
    _UFFDIO_API: int
    UFFD_EVENT_PAGEFAULT: int
    UFFD_EVENT_FORK: int
    UFFD_EVENT_REMAP: int
    UFFD_EVENT_REMOVE: int
    UFFD_EVENT_UNMAP: int
    UFFD_PAGEFAULT_FLAG_WRITE: int
    UFFD_PAGEFAULT_FLAG_WP: int
    UFFD_PAGEFAULT_FLAG_MINOR: int
    UFFD_PAGEFAULT_FLAG_RWP: int
    UFFD_RECEIVED_MAX: int
    UFFD_PM_PFN_MASK: int
    UFFD_PM_SOFT_DIRTY: int
    UFFD_PM_MMAP_EXCLUSIVE: int
    UFFD_PM_UFFD_WP: int
    UFFD_PM_GUARD_REGION: int
    UFFD_PM_FILE: int
    UFFD_PM_SWAP: int
    UFFD_PM_PRESENT: int
    UFFD_PAGE_IS_WPALLOWED: int
    UFFD_PAGE_IS_WRITTEN: int
    UFFD_PAGE_IS_FILE: int
    UFFD_PAGE_IS_PRESENT: int
    UFFD_PAGE_IS_SWAPPED: int
    UFFD_PAGE_IS_PFNZERO: int
    UFFD_PAGE_IS_HUGE: int
    UFFD_PAGE_IS_SOFT_DIRTY: int
    UFFD_PAGE_IS_GUARD: int
    UFFD_PAGE_IS_ACCESSED: int
    UFFD_PM_SCAN_WP_MATCHING: int
    UFFD_PM_SCAN_CHECK_WPASYNC: int
    UFFD_PAGEMAP_SCAN: int
    UFFD_MAPPING_SHARED: int
    UFFD_MAPPING_FILE: int
    UFFD_MAPPING_MINCORE: int
    UFFD_MAPPING_SEEK: int
    UFFD_ROUND_HOLES_APART: int
    UFFD_ROUND_PEEK: int
    UFFD_ARM_AT_ONCE: int
    UFFD_MAP_READ: int
    UFFD_MAP_WRITE: int
    UFFD_MAP_EXECUTE: int
    UFFD_MAP_SHARED: int
    UFFD_PACKED: int
    UFFD_HOT_ROW_SIZE: int
    UFFD_IMAGE_OWN: int
    UFFD_IMAGE_ALL: int
    UFFD_IMAGE_OVERWRITE: int
    UFFD_IMAGE_IF_CHANGED: int
    UFFD_IMAGE_GENTLE: int
    UFFD_IMAGE_UNPROTECTED: int
    UFFD_FRAME_MOST: int
    UFFD_REGISTERS_PARTIAL: int
    UFFD_MAPS_ANONYMOUS: int
    UFFD_MAPS_SHARED: int
    UFFD_MAPS_REGISTERED: int
    UFFD_MAPS_NOT_FORKED: int
    UFFD_LABEL_SIZE: int
    UFFD_KINDS: int
    UFFD_UNSERVE_SEAL: int
    UFFD_UNSERVE_UNREGISTER: int
    UFFD_UNSERVE_GENTLY: int
    UFFD_HISTOGRAM_BUCKETS: int
    UFFD_PAGE_WRITTEN: int
    UFFD_AGENT_BYTES: int
    def uffd_shim_open_syscall(self, flags: int, /) -> int: ...
    def uffd_shim_open_device(self, path: CData, flags: int, /) -> int: ...
    def uffd_shim_api(
        self, fd: int, features: int, features_ret: CData, ioctls_ret: CData, /
    ) -> int: ...
    def uffd_shim_register(
        self, fd: int, start: int, length: int, mode: int, ioctls_ret: CData, /
    ) -> int: ...
    def uffd_shim_try_register(self, fd: int, start: int, length: int, mode: int, /) -> int: ...
    def uffd_shim_unregister(self, fd: int, start: int, length: int, /) -> int: ...
    def uffd_shim_wake(self, fd: int, start: int, length: int, /) -> int: ...
    def uffd_shim_copy(
        self, fd: int, dst: int, src: int, length: int, mode: int, copy_ret: CData, /
    ) -> int: ...
    def uffd_shim_zeropage(
        self, fd: int, start: int, length: int, mode: int, zeropage_ret: CData, /
    ) -> int: ...
    def uffd_shim_move(
        self, fd: int, dst: int, src: int, length: int, mode: int, move_ret: CData, /
    ) -> int: ...
    def uffd_shim_writeprotect(self, fd: int, start: int, length: int, mode: int, /) -> int: ...
    def uffd_shim_continue(
        self, fd: int, start: int, length: int, mode: int, mapped_ret: CData, /
    ) -> int: ...
    def uffd_shim_poison(
        self, fd: int, start: int, length: int, mode: int, updated_ret: CData, /
    ) -> int: ...
    def uffd_shim_rwprotect(self, fd: int, start: int, length: int, mode: int, /) -> int: ...
    def uffd_shim_set_mode(self, fd: int, enable: int, disable: int, /) -> int: ...
    def uffd_shim_read(self, fd: int, buffer: CData, size: int, /) -> int: ...
    def uffd_shim_ioctl_number(self, nr: int, /) -> int: ...
    def uffd_shim_read_memory(self, dst: CData, src: int, length: int, /) -> int: ...
    def uffd_shim_write_memory(self, dst: int, src: CData, length: int, /) -> int: ...
    def uffd_shim_fill_memory(self, dst: int, value: int, length: int, /) -> int: ...
    def uffd_shim_touch_read(self, start: int, length: int, step: int, /) -> int: ...
    def uffd_shim_touch_write(self, start: int, length: int, step: int, /) -> int: ...
    def uffd_shim_unguard(self, /) -> None: ...
    def uffd_shim_note_ended(self, start: int, length: int, fd: int, /) -> int: ...
    def uffd_shim_mmap(
        self,
        address: int,
        length: int,
        prot: int,
        flags: int,
        fd: int,
        offset: int,
        address_ret: CData,
        /,
    ) -> int: ...
    def uffd_shim_munmap(self, start: int, length: int, /) -> int: ...
    def uffd_shim_mremap(
        self, from_: int, length: int, new_length: int, flags: int, to: int, address_ret: CData, /
    ) -> int: ...
    def uffd_shim_mprotect(self, start: int, length: int, prot: int, /) -> int: ...
    def uffd_shim_madvise(self, start: int, length: int, advice: int, /) -> int: ...
    def uffd_shim_memfd_create(self, name: CData, flags: int, /) -> int: ...
    def uffd_shim_fallocate(self, fd: int, mode: int, offset: int, length: int, /) -> int: ...
    def uffd_shim_fstatfs(self, fd: int, type_ret: CData, block_size_ret: CData, /) -> int: ...
    def uffd_owned_open(self, path: CData, flags: int, mode: int, fd_ret: CData, /) -> int: ...
    def uffd_owned_open_syscall(self, flags: int, fd_ret: CData, /) -> int: ...
    def uffd_owned_open_device(self, path: CData, flags: int, fd_ret: CData, /) -> int: ...
    def uffd_owned_memfd_create(self, name: CData, flags: int, fd_ret: CData, /) -> int: ...
    def uffd_owned_duplicate(self, fd: int, least: int, fd_ret: CData, /) -> int: ...
    def uffd_owned_eventfd(self, fd_ret: CData, /) -> int: ...
    def uffd_owned_pipe(self, least: int, read_ret: CData, write_ret: CData, /) -> int: ...
    def uffd_owned_pidfd_open(self, pid: int, fd_ret: CData, /) -> int: ...
    def uffd_owned_close(self, fd: CData, /) -> int: ...
    def uffd_owned_move(self, from_: CData, fd_ret: CData, /) -> None: ...
    def uffd_owned_mmap(
        self,
        address: int,
        length: int,
        prot: int,
        flags: int,
        fd: int,
        offset: int,
        mapping_ret: CData,
        /,
    ) -> int: ...
    def uffd_owned_munmap(self, mapping: CData, /) -> int: ...
    def uffd_owned_move_mapping(self, from_: CData, mapping_ret: CData, /) -> None: ...
    def uffd_owned_create(
        self, path: CData, flags: int, mode: int, fd_ret: CData, name_ret: CData, /
    ) -> int: ...
    def uffd_owned_name(self, path: CData, fd: int, name_ret: CData, /) -> int: ...
    def uffd_owned_unlink(self, name: CData, /) -> int: ...
    def uffd_owned_move_name(self, from_: CData, name_ret: CData, /) -> None: ...
    def uffd_owned_receive(
        self, sock: int, buffer: CData, size: int, received: CData, /
    ) -> int: ...
    def uffd_owned_take(self, received: CData, index: int, fd_ret: CData, /) -> None: ...
    def uffd_owned_take_pidfd(self, received: CData, fd_ret: CData, /) -> None: ...
    def uffd_owned_close_received(self, received: CData, /) -> None: ...
    def uffd_owned_read(self, fd: int, messages: CData, /) -> int: ...
    def uffd_owned_take_fork(self, messages: CData, index: int, fd_ret: CData, /) -> None: ...
    def uffd_owned_close_forks(self, messages: CData, /) -> None: ...
    def uffd_pagemap_release(self, ranges: CData, /) -> None: ...
    def uffd_pagemap_alive(self, fd: int, /) -> int: ...
    def uffd_pagemap_read(
        self, fd: int, start: int, pages: int, entries: CData, pages_ret: CData, /
    ) -> int: ...
    def uffd_pagemap_count(
        self, entries: CData, pages: int, mask: int, value: int, count_ret: CData, /
    ) -> int: ...
    def uffd_pagemap_runs(
        self, entries: CData, pages: int, start: int, mask: int, value: int, ranges_ret: CData, /
    ) -> int: ...
    def uffd_pagemap_state_runs(
        self,
        states: CData,
        pages: int,
        start: int,
        page_size: int,
        state: int,
        ranges_ret: CData,
        /,
    ) -> int: ...
    def uffd_pagemap_bytes(self, vec: CData, count: int, bytes_ret: CData, /) -> int: ...
    def uffd_pagemap_scan(self, fd: int, arg: CData, count_ret: CData, /) -> int: ...
    def uffd_pagemap_scan_all(
        self, fd: int, request: CData, ranges_ret: CData, walk_end_ret: CData, /
    ) -> int: ...
    def uffd_pagemap_first_of(
        self, fd: int, spans: CData, count: int, anyof: int, index_ret: CData, /
    ) -> int: ...
    UFFD_RESIDENCY_HOLE: int
    UFFD_RESIDENCY_SWAPPED: int
    UFFD_RESIDENCY_RESIDENT: int
    UFFD_RESIDENCY_MAPPED: int
    UFFD_RESIDENCY_PRIVATE: int
    UFFD_RESIDENCY_POISON: int
    UFFD_RESIDENCY_UNKNOWN: int
    def uffd_residency_of(
        self,
        pagemap_fd: int,
        start: int,
        length: int,
        page_size: int,
        file_fd: int,
        offset: int,
        mapping: int,
        states_ret: CData,
        /,
    ) -> int: ...
    def uffd_ranges_append(self, ranges: CData, start: int, end: int, /) -> int: ...
    def uffd_ranges_union(
        self, a: CData, a_count: int, b: CData, b_count: int, ranges_ret: CData, /
    ) -> int: ...
    def uffd_ranges_subtract(
        self, a: CData, a_count: int, b: CData, b_count: int, ranges_ret: CData, /
    ) -> int: ...
    def uffd_ranges_intersect(
        self, a: CData, a_count: int, b: CData, b_count: int, ranges_ret: CData, /
    ) -> int: ...
    def uffd_ranges_bytes_in(
        self, a: CData, a_count: int, spans: CData, spans_count: int, bytes_ret: CData, /
    ) -> int: ...
    UFFD_TRACK_DENSE: int
    UFFD_TRACK_SPARSE: int
    UFFD_TRACK_HUGE: int
    UFFD_BACKING_FILE: int
    UFFD_BACKING_ZERO: int
    UFFD_BACKING_COPIED: int
    def uffd_round(
        self,
        pagemap_fd: int,
        tracked: CData,
        count: int,
        flags: int,
        known: CData,
        known_count: int,
        written_ret: CData,
        dropped_ret: CData,
        known_ret: CData,
        /,
    ) -> int: ...
    def uffd_round_protect(self, uffd: int, vec: CData, count: int, /) -> int: ...
    def uffd_round_populated(
        self, pagemap_fd: int, start: int, end: int, bytes_ret: CData, /
    ) -> int: ...
    def uffd_arm_run(self, at: CData, count: int, /) -> int: ...
    def uffd_arm_register(self, tracked: CData, count: int, /) -> None: ...
    def uffd_arm_protect(self, uffd: int, tracked: CData, count: int, /) -> int: ...
    def uffd_arm_unregister(self, tracked: CData, count: int, /) -> None: ...
    def uffd_drops_create(self, uffd: int, drops_ret: CData, /) -> int: ...
    def uffd_drops_take(self, drops: CData, ranges_ret: CData, lost_ret: CData, /) -> int: ...
    def uffd_drops_destroy(self, drops: CData, /) -> None: ...
    def uffd_maps_read(self, fd: int, maps_ret: CData, /) -> int: ...
    def uffd_maps_query(
        self, fd: int, vec: CData, count: int, most: int, maps_ret: CData, /
    ) -> int: ...
    def uffd_maps_free(self, maps: CData, /) -> None: ...
    def uffd_maps_page_size(self, fd: int, start: int, page_size_ret: CData, /) -> int: ...
    def uffd_remote_read(
        self,
        pid: int,
        vec: CData,
        count: int,
        target: CData,
        size: int,
        base: int,
        lost_ret: CData,
        copied_ret: CData,
        /,
    ) -> int: ...
    def uffd_remote_read_to_file(
        self,
        pid: int,
        vec: CData,
        count: int,
        fd: int,
        offset: int,
        base: int,
        lost_ret: CData,
        copied_ret: CData,
        /,
    ) -> int: ...
    def uffd_remote_write(self, pid: int, start: int, source: CData, length: int, /) -> int: ...
    def uffd_remote_find(
        self,
        pid: int,
        start: int,
        end: int,
        pattern: CData,
        pattern_length: int,
        address_ret: CData,
        /,
    ) -> int: ...
    def uffd_remote_same_memory(self, pid: int, other_pid: int, /) -> int: ...
    def uffd_remote_pinners(self, pid: int, pinners: CData, /) -> int: ...
    def uffd_remote_reads(self, pid: int, reads_ret: CData, /) -> int: ...
    def uffd_remote_free_reads(self, reads: CData, /) -> None: ...
    def uffd_trace_allow(self, pid: int, /) -> int: ...
    def uffd_chain_resolve(
        self, tables: CData, depth: int, start: int, end: int, piece: int, ret: CData, /
    ) -> int: ...
    def uffd_chain_free(self, chain: CData, /) -> None: ...
    def uffd_chain_first_bad(
        self, rows: CData, count: int, pages_length: int, chunk: int, /
    ) -> int: ...
    def uffd_hot_check(
        self, rows: CData, count: int, image_pages: int, recordings: int, most_pages: int, /
    ) -> int: ...
    def uffd_hot_plan(
        self,
        rows: CData,
        count: int,
        percent: int,
        places: CData,
        places_count: int,
        window: int,
        ret: CData,
        /,
    ) -> int: ...
    def uffd_hot_plan_free(self, plan: CData, /) -> None: ...
    def uffd_hot_read_ahead(
        self,
        ranges: CData,
        count: int,
        runs: CData,
        runs_count: int,
        length: int,
        fds: CData,
        fds_count: int,
        /,
    ) -> int: ...
    def uffd_image_copy(
        self,
        pid: int,
        mem_fd: int,
        vec: CData,
        count: int,
        pieces: CData,
        pieces_count: int,
        fd: int,
        flags: int,
        zero_ret: CData,
        lost_ret: CData,
        done_ret: CData,
        /,
    ) -> int: ...
    def uffd_image_begin_sync(self, fd: int, /) -> None: ...
    def uffd_be_gentle(self, /) -> None: ...
    def uffd_image_write(
        self,
        vec: CData,
        count: int,
        data: CData,
        pieces: CData,
        pieces_count: int,
        fd: int,
        flags: int,
        zero_ret: CData,
        /,
    ) -> int: ...
    def uffd_image_scan(
        self,
        pagemap_fd: int,
        pieces: CData,
        what: CData,
        count: int,
        flags: int,
        within: CData,
        ranges_ret: CData,
        swapped_ret: CData,
        /,
    ) -> int: ...
    def uffd_image_differ(
        self, a: CData, b: CData, length: int, start: int, ranges_ret: CData, /
    ) -> int: ...
    UFFD_REPLACE_REGISTER: int
    UFFD_REPLACE_LOOK: int
    UFFD_REPLACE_MAP: int
    def uffd_replace_untouched(
        self,
        uffd: int,
        pagemap_fd: int,
        spans: CData,
        count: int,
        vec: CData,
        vec_count: int,
        step_ret: CData,
        at_ret: CData,
        /,
    ) -> int: ...
    UFFD_OWED_NOT: int
    UFFD_OWED_YES: int
    UFFD_OWED_TAKEN: int
    UFFD_OWED_DATA: int
    UFFD_OWED_ZERO: int
    UFFD_OWED_DROPPED: int
    UFFD_OWED_UNREADABLE: int
    def uffd_saver_create(self, options: CData, saver_ret: CData, /) -> int: ...
    def uffd_saver_arm(self, saver: CData, vec: CData, count: int, registers: int, /) -> int: ...
    def uffd_saver_unregistered(
        self, saver: CData, vec: CData, count: int, ranges_ret: CData, /
    ) -> int: ...
    def uffd_saver_take_noted(
        self, saver: CData, ranges_ret: CData, changed_ret: CData, /
    ) -> int: ...
    def uffd_saver_prepare(
        self, saver: CData, parts: CData, parts_count: int, pages: CData, count: int, /
    ) -> int: ...
    def uffd_saver_begin(
        self, saver: CData, parts: CData, parts_count: int, pages: CData, count: int, /
    ) -> int: ...
    def uffd_saver_wait(self, saver: CData, limit_ns: int, /) -> int: ...
    def uffd_saver_stats(self, saver: CData, stats_ret: CData, /) -> None: ...
    def uffd_saver_ranges(self, saver: CData, state: int, ranges_ret: CData, /) -> int: ...
    def uffd_saver_destroy(self, saver: CData, /) -> None: ...
    def uffd_unregister_mappings(self, uffd: int, maps_fd: int, start: int, end: int, /) -> int: ...
    UFFD_ATTACH_BEGIN: int
    UFFD_ATTACH_SEIZED: int
    UFFD_ATTACH_STOPPED: int
    UFFD_ATTACH_FRAMED: int
    UFFD_ATTACH_REDIRECTED: int
    UFFD_ATTACH_MASKED: int
    UFFD_ATTACH_MAPPED: int
    UFFD_ATTACH_PREPARED: int
    UFFD_ATTACH_CLONED: int
    UFFD_ATTACH_OPENED: int
    UFFD_ATTACH_FETCHED: int
    UFFD_ATTACH_ENDED: int
    UFFD_ATTACH_UNMAPPED: int
    UFFD_ATTACH_HALTED: int
    UFFD_ATTACH_UNMASKED: int
    UFFD_ATTACH_RESTORED: int
    UFFD_ATTACH_DONE: int
    def uffd_attach(self, attach: CData, fd_ret: CData, /) -> int: ...
    def uffd_registers_to_standard(self, sets: CData, /) -> int: ...
    def uffd_registers_free(self, sets: CData, /) -> None: ...
    def uffd_stopped_create(
        self,
        pids: CData,
        count: int,
        limit_ns: int,
        asleep_limit_ns: int,
        stopped_ret: CData,
        tid_ret: CData,
        threads_ret: CData,
        ns_ret: CData,
        /,
    ) -> int: ...
    def uffd_stopped_registers(self, stopped: CData, sets_ret: CData, /) -> int: ...
    def uffd_stopped_end(self, stopped: CData, /) -> int: ...
    def uffd_stopped_release(self, stopped: CData, /) -> None: ...
    UFFD_FILL_COPY: int
    UFFD_FILL_ZERO: int
    UFFD_FILL_CONTINUE: int
    UFFD_FILL_POISON: int
    UFFD_FILL_MOVE: int
    def uffd_fill_run(self, fill: CData, result_ret: CData, /) -> int: ...
    def uffd_now_ns(self, /) -> int: ...
    def uffd_transfer_read(
        self, fd: int, at: int, target: CData, length: int, done: CData, /
    ) -> int: ...
    def uffd_transfer_write(
        self, fd: int, at: int, source: CData, length: int, done: CData, /
    ) -> int: ...
    def uffd_transfer_poll(
        self, fds: CData, events: CData, count: int, timeout_ms: int, /
    ) -> int: ...
    UFFD_PAGE_ABSENT: int
    UFFD_PAGE_IN_FLIGHT: int
    UFFD_PAGE_CLEAN: int
    UFFD_PAGE_DIRTY: int
    UFFD_PAGE_REMOVED: int
    UFFD_PAGE_POISONED: int
    UFFD_PAGE_SAVED: int
    UFFD_PAGE_REQUESTED: int
    UFFD_SOURCE_NONE: int
    UFFD_SOURCE_ZERO: int
    UFFD_SOURCE_MEMORY: int
    UFFD_SOURCE_FILE: int
    UFFD_SOURCE_REQUEST: int
    UFFD_SOURCE_OVERLAY: int
    UFFD_LEAF_ZERO: int
    UFFD_LEAF_MEMORY: int
    UFFD_LEAF_FILE: int
    UFFD_LEAF_REQUEST: int
    UFFD_REPORT_ADDED: int
    UFFD_REPORT_DROPPED: int
    UFFD_REPORT_PIECES: int
    UFFD_REPORT_FORK: int
    UFFD_REPORT_GONE: int
    def uffd_keeper_follow_parent(self, parent: int, /) -> int: ...
    def uffd_keeper_hold_descriptors(
        self, shared: CData, keeper: int, sockets: CData, count: int, /
    ) -> int: ...
    def uffd_keeper_rescue_fork(self, shared: CData, position: CData, /) -> int: ...
    def uffd_keeper_release_holder(self, shared: CData, /) -> None: ...
    UFFD_BARRIER_STEP_READ: int
    UFFD_BARRIER_STEP_APPLIED: int
    UFFD_BARRIER_FAULT_CLAIMED: int
    UFFD_BARRIER_FAULT_WOKEN: int
    UFFD_BARRIER_FILL_CLAIMED: int
    UFFD_BARRIER_PLACED: int
    UFFD_BARRIER_REQUEST_TAKEN: int
    UFFD_BARRIER_COMPLETE: int
    UFFD_BARRIER_UNSERVE_SEALED: int
    UFFD_BARRIER_LIFTED: int
    UFFD_BARRIER_EVICT_PLACED: int
    UFFD_BARRIER_EVICT_CLAIMED: int
    UFFD_BARRIER_EVICT_DROPPED: int
    UFFD_BARRIER_REGISTERED: int
    def uffd_barrier_arm(self, point: int, /) -> int: ...
    def uffd_barrier_wait(self, point: int, limit_ns: int, /) -> int: ...
    def uffd_barrier_release(self, point: int, /) -> None: ...
    def uffd_alloc_fail_nth(self, n: int, /) -> int: ...
    def uffd_owner_look(
        self, pid: int, start: int, length: int, all_facts: int, facts_ret: CData, /
    ) -> int: ...
    def uffd_owner_read(self, pid: int, start: int, target: CData, length: int, /) -> int: ...
    def uffd_owner_touch(self, pid: int, start: int, length: int, step: int, /) -> int: ...
    UFFD_ON_ERROR_POISON: int
    UFFD_ON_ERROR_STALL: int
    UFFD_ON_ERROR_KILL: int
    UFFD_FAILED_NOTHING: int
    UFFD_FAILED_SOURCE: int
    UFFD_FAILED_RESOLVE: int
    UFFD_FAILED_UNSERVED: int
    UFFD_FAILED_READ: int
    UFFD_FAILED_FORK: int
    UFFD_FAILED_STALLED: int
    UFFD_FAILED_SAVE: int
    UFFD_FAILURE_STAGES: int
    def uffd_engine_shared_size(self, fault_log: int, /) -> int: ...
    def uffd_engine_create(self, options: CData, ret: CData, call_ret: CData, /) -> int: ...
    def uffd_engine_destroy(self, engine: CData, /) -> None: ...
    def uffd_engine_add_space(
        self, engine: CData, fd: int, layout_events: int, owner_pid: int, space_ret: CData, /
    ) -> int: ...
    def uffd_engine_adopt_space(
        self,
        engine: CData,
        fd: int,
        is_fork: int,
        layout_events: int,
        owner_pid: int,
        space: int,
        /,
    ) -> int: ...
    def uffd_engine_expect_unmap(
        self, engine: CData, space: int, start: int, end: int, /
    ) -> int: ...
    def uffd_engine_replay(self, engine: CData, reported: int, /) -> None: ...
    def uffd_engine_remove_space(self, engine: CData, space: int, limit_ns: int, /) -> int: ...
    def uffd_engine_add(self, engine: CData, space: int, spec: CData, id_ret: CData, /) -> int: ...
    UFFD_PRESENT_ANY: int
    UFFD_PRESENT_REFUSE: int
    UFFD_PRESENT_KEEP: int
    UFFD_PRESENT_DROP: int
    UFFD_OPEN_REGISTER: int
    UFFD_OPEN_LOOK: int
    UFFD_OPEN_DROP: int
    UFFD_OPEN_POISON: int
    def uffd_register_dropped(
        self, dropping: CData, sock: int, message: CData, size: int, /
    ) -> int: ...
    def uffd_engine_open(self, engine: CData, ref: CData, opening: CData, /) -> int: ...
    def uffd_engine_set_ioctls(self, engine: CData, ref: CData, ioctls: int, /) -> int: ...
    def uffd_engine_serve_many(
        self, engine: CData, space: int, specs: CData, count: int, needed: int, served_ret: CData, /
    ) -> int: ...
    def uffd_engine_note_registered(
        self, engine: CData, space: int, start: int, end: int, /
    ) -> int: ...
    def uffd_engine_know_registered(self, engine: CData, space: int, /) -> int: ...
    def uffd_engine_note_unregistered(
        self, engine: CData, space: int, start: int, end: int, /
    ) -> int: ...
    def uffd_engine_unserve(
        self, engine: CData, ref: CData, flags: int, patience_ns: int, /
    ) -> int: ...
    def uffd_engine_unserve_part(
        self, engine: CData, ref: CData, offset: int, length: int, flags: int, patience_ns: int, /
    ) -> int: ...
    def uffd_engine_populate(
        self, engine: CData, ref: CData, offset: int, length: int, chunk: int, result_ret: CData, /
    ) -> int: ...
    def uffd_engine_populate_ranges(
        self,
        engine: CData,
        ref: CData,
        offset: int,
        length: int,
        words: CData,
        width: int,
        count: int,
        chunk: int,
        result_ret: CData,
        /,
    ) -> int: ...
    def uffd_engine_load(
        self, engine: CData, ref: CData, offset: int, length: int, chunk: int, result_ret: CData, /
    ) -> int: ...
    def uffd_engine_fill(
        self,
        engine: CData,
        ref: CData,
        offset: int,
        length: int,
        data: CData,
        unprotected: int,
        filled_ret: CData,
        reached_ret: CData,
        /,
    ) -> int: ...
    def uffd_engine_fill_from_files(
        self, engine: CData, ref: CData, rows: CData, count: int, files: CData, filled_ret: CData, /
    ) -> int: ...
    def uffd_engine_preserve(
        self,
        engine: CData,
        ref: CData,
        offset: int,
        length: int,
        unprotect: int,
        saved_ret: CData,
        reached_ret: CData,
        /,
    ) -> int: ...
    UFFD_UNPROTECT: int
    UFFD_PROTECT: int
    UFFD_PROTECT_TO_EVICT: int
    UFFD_PROTECT_TO_CHECK: int
    def uffd_engine_writeprotect(
        self, engine: CData, ref: CData, offset: int, length: int, how: int, states_ret: CData, /
    ) -> int: ...
    def uffd_runs_of(
        self,
        states: CData,
        pages: int,
        page_size: int,
        offset: int,
        without: int,
        runs_ret: CData,
        capacity: int,
        /,
    ) -> int: ...
    def uffd_engine_take_in(self, engine: CData, ref: CData, /) -> int: ...
    def uffd_engine_states(
        self, engine: CData, ref: CData, first_page: int, pages: int, states_ret: CData, /
    ) -> int: ...
    def uffd_engine_peek(
        self, engine: CData, ref: CData, offset: int, length: int, target: CData, /
    ) -> int: ...
    def uffd_engine_evict(
        self,
        engine: CData,
        ref: CData,
        offset: int,
        length: int,
        wanted: CData,
        written_too: int,
        evicted_ret: CData,
        reached_ret: CData,
        /,
    ) -> int: ...
    def uffd_engine_evict_to(
        self,
        engine: CData,
        ref: CData,
        offset: int,
        length: int,
        fd: int,
        begin: int,
        written_only: int,
        evicted_ret: CData,
        reached_ret: CData,
        /,
    ) -> int: ...
    def uffd_engine_retry(
        self, engine: CData, ref: CData, offset: int, length: int, failed_ret: CData, /
    ) -> int: ...
    def uffd_engine_pause(self, engine: CData, limit_ns: int, token_ret: CData, /) -> int: ...
    def uffd_engine_resume(self, engine: CData, token: int, /) -> int: ...
    def uffd_engine_leave_strays(self, engine: CData, /) -> None: ...
    def uffd_engine_wake_all(self, engine: CData, /) -> None: ...
    def uffd_engine_wake_read(self, engine: CData, /) -> None: ...
    def uffd_engine_refuse(self, engine: CData, /) -> None: ...
    def uffd_engine_abandon(self, engine: CData, id: int, error: int, /) -> None: ...
    def uffd_engine_abandon_part(
        self, engine: CData, id: int, offset: int, length: int, /
    ) -> None: ...
    def uffd_engine_hung(self, engine: CData, /) -> int: ...
    def uffd_engine_end(self, engine: CData, patience_ns: int, /) -> int: ...
    def uffd_engine_hurry(self, engine: CData, patience_ns: int, /) -> None: ...
    def uffd_engine_progress(self, engine: CData, /) -> int: ...
    def uffd_engine_held(self, engine: CData, held_ret: CData, capacity: int, /) -> int: ...
    def uffd_engine_is_deserted(self, engine: CData, /) -> int: ...
    def uffd_engine_discard(self, engine: CData, /) -> int: ...
    def uffd_engine_stats(self, engine: CData, stats_ret: CData, /) -> None: ...
    def uffd_engine_fault_count(self, engine: CData, /) -> int: ...
    def uffd_engine_spaces(self, engine: CData, /) -> int: ...
    def uffd_engine_owner_exited(self, engine: CData, /) -> int: ...
    def uffd_engine_recent_count(self, engine: CData, /) -> int: ...
    def uffd_engine_recent(self, engine: CData, recent_ret: CData, capacity: int, /) -> int: ...
    def uffd_engine_take_faults(
        self, engine: CData, faults_ret: CData, capacity: int, lost_ret: CData, /
    ) -> int: ...
    def uffd_engine_logged_faults(self, engine: CData, /) -> int: ...
    def uffd_engine_failure(self, engine: CData, failure_ret: CData, /) -> None: ...
    def uffd_histogram_bound(self, bucket: int, /) -> int: ...
    def uffd_engine_next_request(self, engine: CData, /) -> CData: ...
    def uffd_engine_complete(self, engine: CData, request: CData, data: CData, /) -> int: ...
    def uffd_engine_complete_next(self, engine: CData, request: CData, data: CData, /) -> CData: ...
    def uffd_engine_promise_next(self, engine: CData, request: CData, /) -> CData: ...
    def uffd_engine_ask_again(self, engine: CData, request: CData, /) -> int: ...
    def uffd_engine_fail(self, engine: CData, request: CData, error: int, /) -> int: ...
    def uffd_native_start(
        self, engine: CData, cpus: CData, cpu_count: int, call_ret: CData, /
    ) -> int: ...
    def uffd_native_drain(self, engine: CData, limit_ns: int, /) -> int: ...
    def uffd_native_stop(self, engine: CData, /) -> None: ...
    def uffd_inline_start(self, engine: CData, /) -> int: ...
    def uffd_inline_stop(self, engine: CData, to_original: int, /) -> None: ...
    def uffd_inline_is_installed(self, /) -> int: ...
    def uffd_inline_reinstall(self, /) -> int: ...
    def uffd_inline_serves(self, address: int, /) -> int: ...
    UFFD_AGENT_READ: int
    UFFD_AGENT_WRITE: int
    UFFD_AGENT_SYSCALL: int
    def uffd_guarded_read(self, address: int, buffer: CData, length: int, ret: CData, /) -> int: ...
    def uffd_guarded_write(
        self, address: int, buffer: CData, length: int, ret: CData, /
    ) -> int: ...
    def uffd_agent_fork(self, fd: int, /) -> int: ...
    def uffd_reads_read(self, fd: int, buffer: CData, size: int, /) -> int: ...
    UFFD_WATCH_USER: int
    UFFD_WATCH_HANDLER: int
    def uffd_watch_begin(self, watched: CData, /) -> None: ...
    def uffd_watch_end(self, fd: int, /) -> None: ...
    def uffd_watch_pause(self, /) -> None: ...
    def uffd_watch_resume(self, /) -> None: ...

lib: _Lib
