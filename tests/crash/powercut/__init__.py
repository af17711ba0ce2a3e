"""Power cuts for any program's directory: record its file operations below the process, replay what a cut may leave.

``record`` mounts an in-memory FUSE file system over a directory, runs a program on it and logs every operation and sync
point in one total order. ``disk`` says what a disk may hold when the power goes at any point of that log, ``replay``
lays such states out and runs a checker on each. Linux, root (mount, seccomp), x86-64 or arm64.

**What a cut leaves.** A file's fsync or fdatasync makes its data and size durable, a directory's fsync its names,
syncfs and sync everything. fdatasync leaves mode, owner and times out. A new name needs its directory's fsync, a new
directory its parent's. Of the rest each state loses something by a seeded strategy: all, nothing, a suffix in time,
only names, only data, per file, or per 512-byte or 4-KiB block (each block holds one of its versions since the last
sync; sizes may stop between blocks). Half the cuts are placed where it hurts: after an acknowledgement or a change of
names, or just before a sync.

* ``ordered``: a directory's unsynced operations survive as a prefix; after a lost truncate later changes are lost too;
  a move between directories counts with either directory's fsync;
* ``harsh``: each operation is lost on its own; a move is durable with its new directory's fsync only.

**Faults** ``KIND:N[+]:ERRNO[:GLOB]`` fail the N-th call (with +, and all later ones) of write, fsync (fdatasync too),
fsyncdir, syncfs, create, rename, unlink, link, truncate or fallocate. After a failed sync the data written before it is
lost for good unless it is written again, as on Linux.

**Not seen.** Stores through mmap appear only at msync, fsync, unmap or write-back. No extended attributes, no reflinks.
Contents live in memory. Old data of freed blocks is never exposed; there is no bit rot.
"""
