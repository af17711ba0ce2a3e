"""One libtorrent peer, run by an interpreter that has libtorrent (it is in no lock of ours).

``torrent_peer.py make FILE TORRENT``, then ``… seed|super|leech TORRENT FOLDER ADDRESS STATUS PEER…``. Defaults of
libtorrent, but for discovery: no DHT, no local discovery, no port mapping; each peer is told the others' addresses, as
a tracker would. STATUS is a file of one JSON object, replaced twice a second.
"""

import json
import sys
import time
from pathlib import Path

import libtorrent as lt  # type: ignore[import-not-found]

PORT = 6881


def make(file: str, torrent: str) -> None:
    files = lt.list_files(file) if hasattr(lt, "list_files") else None
    made = lt.create_torrent(files) if files is not None else _made(file)
    lt.set_piece_hashes(made, str(Path(file).parent))
    Path(torrent).write_bytes(lt.bencode(made.generate()))


def _made(file: str) -> "lt.create_torrent":
    storage = lt.file_storage()
    lt.add_files(storage, file)
    return lt.create_torrent(storage)


def run(role: str, torrent: str, folder: str, address: str, status: str, peers: list[str]) -> None:
    session = lt.session(
        {
            "listen_interfaces": f"{address}:{PORT}",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "alert_mask": lt.alert.category_t.status_notification
            | lt.alert.category_t.error_notification,
        }
    )
    wanted = lt.add_torrent_params()
    wanted.ti = lt.torrent_info(torrent)
    wanted.save_path = folder
    if role == "seed":
        wanted.flags |= lt.torrent_flags.seed_mode
    if role == "super":
        wanted.flags |= lt.torrent_flags.seed_mode | lt.torrent_flags.super_seeding
    started = time.time()
    handle = session.add_torrent(wanted)
    finished: float | None = None
    connected = 0.0
    while True:
        now = time.time()
        state = handle.status()
        if finished is None and state.is_seeding:
            finished = now
        if now - connected > 2:
            connected = now
            for peer in peers:
                handle.connect_peer((peer, PORT))
        facts = {
            "started": started,
            "finished": finished,
            "done": int(state.total_wanted_done),
            "peers": int(state.num_peers),
            "upload": int(state.total_upload),
        }
        part = Path(status + ".part")
        part.write_text(json.dumps(facts))
        part.replace(status)
        time.sleep(0.05 if finished is None else 0.5)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(*sys.argv[2:4])
    else:
        role, torrent, folder, address, status, *peers = sys.argv[1:]
        run(role, torrent, folder, address, status, peers)
