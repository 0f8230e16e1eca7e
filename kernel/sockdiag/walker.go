package sockdiag

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The object is made from destroy.bpf.c by the pinned clang and committed, so that
// building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel destroy destroy.bpf.c -- -O2 -Wall -Werror -mcpu=v3

// walker closes sockets by programs that walk over those of a namespace.
type walker struct {
	objects destroyObjects
	walks   map[uint8]*link.Iter
}

func newWalker() (*walker, error) {
	w := &walker{walks: map[uint8]*link.Iter{}}
	if err := loadDestroyObjects(&w.objects, nil); err != nil {
		return nil, err
	}
	for protocol, program := range map[uint8]*ebpf.Program{
		unix.IPPROTO_TCP: w.objects.DestroyTcp, unix.IPPROTO_UDP: w.objects.DestroyUdp,
	} {
		walk, err := link.AttachIter(link.IterOptions{Program: program})
		if err != nil {
			w.close()
			return nil, err
		}
		w.walks[protocol] = walk
	}
	return w, nil
}

func (w *walker) close() {
	for _, walk := range w.walks {
		walk.Close()
	}
	w.objects.Close()
}

// closeHere closes sockets of the calling thread's namespace: it is that of whoever
// opens the walk.
func (w *walker) closeHere(sockets []Socket) ([]error, error) {
	errs := make([]error, len(sockets))
	for protocol, walk := range w.walks {
		at := map[uint64]int{}
		for i, s := range sockets {
			if s.Protocol == protocol {
				at[s.Cookie] = i
				errs[i] = ErrEnded // unless the walk meets it
			}
		}
		if len(at) == 0 {
			continue
		}
		met, err := w.walk(walk, at)
		if err != nil {
			return nil, err
		}
		for _, cookie := range met {
			errs[at[cookie]] = nil
		}
	}
	return errs, nil
}

// walk returns the cookies of the sockets that it closed.
func (w *walker) walk(walk *link.Iter, cookies map[uint64]int) (met []uint64, err error) {
	for cookie := range cookies {
		if err := w.objects.Condemned.Put(cookie, uint8(1)); err != nil {
			return nil, fmt.Errorf("%s: write cookie: %w", act, err)
		}
		defer w.objects.Condemned.Delete(cookie)
	}
	run, err := walk.Open()
	if err != nil {
		return nil, fmt.Errorf("%s: begin walk: %w", act, err)
	}
	defer run.Close()
	found, err := io.ReadAll(run)
	if err != nil {
		return nil, fmt.Errorf("%s: walk: %w", act, err)
	}
	for ; len(found) >= 8; found = found[8:] {
		met = append(met, binary.NativeEndian.Uint64(found))
	}
	return met, nil
}
