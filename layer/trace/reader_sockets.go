package trace

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/layer/trace/cause"
)

// States of TCP (net/tcp_states.h).
const (
	tcpEstablished = 1
	tcpSynSent     = 2
	tcpSynReceived = 3
	tcpTimeWait    = 6
	tcpClose       = 7
	tcpCloseWait   = 8
	tcpListen      = 10
)

const (
	mostSockets = 2000 // of one namespace
	mostBusy    = 8    // remote ends
	longQueue   = 4096 // bytes that a TCP socket has not read
)

// remote is what local ports are taken towards.
type remote struct {
	protocol uint8
	local    netip.Addr
	remote   netip.AddrPort
}

// sockets walks over those of the calling thread's namespace and keeps what can matter.
func sockets() (kept []cause.Socket, busy []cause.Busy, err error) {
	taken := map[remote]int{}
	keep := func(s sockdiag.State) {
		connected := s.Remote.Port() != 0
		if connected && s.State != tcpListen {
			if key := (remote{s.Protocol, s.Local.Addr(), s.Remote}); taken[key] > 0 || len(taken) < mostSockets {
				taken[key]++
			}
		}
		if len(kept) < mostSockets && matters(s) {
			kept = append(kept, socketOf(s))
		}
	}
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_RAW} {
		if e := sockdiag.Walk(protocol, keep); e != nil && protocol != unix.IPPROTO_RAW {
			err = e // raw sockets take a module that may be missing
		}
	}
	for key, ports := range taken {
		busy = append(busy, cause.Busy{Protocol: key.protocol, Local: key.local, Remote: key.remote, Ports: ports})
	}
	slices.SortFunc(busy, func(a, b cause.Busy) int { return b.Ports - a.Ports })
	return kept, busy[:min(len(busy), mostBusy)], err
}

// matters says whether a socket may be a cause, or may have met one.
func matters(s sockdiag.State) bool {
	if s.Protocol != unix.IPPROTO_TCP {
		return true
	}
	switch s.State {
	case tcpListen, tcpSynSent, tcpSynReceived:
		return true
	case tcpTimeWait:
		return false
	}
	return s.Timer == sockdiag.TimerProbe || s.Timer == sockdiag.TimerRetransmit && s.Tries > 0 ||
		s.TotalRetransmits > 0 || s.ReceiveQueue >= longQueue || s.Drops > 0
}

func socketOf(s sockdiag.State) cause.Socket {
	return cause.Socket{
		Protocol: s.Protocol, Local: s.Local, Remote: s.Remote, State: s.State,
		Inode: s.Inode, Cookie: s.Cookie, Cgroup: s.Cgroup,
		ReceiveQueue: s.ReceiveQueue, SendQueue: s.SendQueue, Drops: s.Drops, ReceiveBuffer: s.ReceiveBuffer,
		Retransmits: s.Tries, Backoff: s.Backoff, Probing: s.Timer == sockdiag.TimerProbe, MSS: s.MSS, PathMTU: s.PathMTU,
		TotalRetransmits: s.TotalRetransmits, BytesAcked: s.BytesAcked, BytesReceived: s.BytesReceived,
		ReceiveWindow: s.ReceiveWindow, SendWindow: s.SendWindow,
		LastSent: s.LastSent, LastReceived: s.LastReceived, RTT: s.RTT,
	}
}

// secondLook is how long after the window those sockets are looked at again whose window
// is zero: a program that is only slow has read something by then, or the next time that
// somebody is slow for as long.
const secondLook = 500 * time.Millisecond

// waits says whether a connection's sender waits for its receiver, seen from either end.
func waits(s *cause.Socket) bool {
	return s.Protocol == unix.IPPROTO_TCP && s.State != tcpListen && (s.Probing || s.ReceiveQueue > 0 && s.ReceiveWindow < max(s.MSS, 1))
}

// lookAgain says of connections that wait whether anything moves there.
func (r *Reader) lookAgain(ctx context.Context, spaces []*cause.Space) {
	waiting := map[uint32]map[uint64]*cause.Socket{}
	for _, s := range spaces {
		for i := range s.After.Sockets {
			if o := &s.After.Sockets[i]; waits(o) {
				if waiting[s.Inode] == nil {
					waiting[s.Inode] = map[uint64]*cause.Socket{}
				}
				waiting[s.Inode][o.Cookie] = o
			}
		}
	}
	if len(waiting) == 0 {
		return
	}
	select {
	case <-ctx.Done():
		return
	case <-time.After(secondLook):
	}
	err := r.each(ctx, func(n Namespace) error {
		sockets := waiting[n.Inode]
		if sockets == nil {
			return nil
		}
		return sockdiag.Walk(unix.IPPROTO_TCP, func(now sockdiag.State) {
			if o := sockets[now.Cookie]; o != nil {
				o.Idle = now.ReceiveQueue == o.ReceiveQueue && now.SendQueue == o.SendQueue &&
					now.BytesReceived == o.BytesReceived && now.BytesAcked == o.BytesAcked
			}
		})
	})
	r.miss("sockets, a second time", err)
}

// processes finds who holds the sockets of the evidence: every listener, UDP socket and
// connection that was kept. It walks over /proc once.
func processes(e *cause.Evidence) {
	wanted := map[uint32]*cause.Space{}
	for _, s := range e.Spaces {
		s.Processes = map[uint32]cause.Process{}
		for _, socket := range s.After.Sockets {
			if socket.Inode != 0 {
				wanted[socket.Inode] = s
			}
		}
	}
	folders, err := netns.Processes()
	if err != nil || len(wanted) == 0 {
		return
	}
	for _, folder := range folders {
		holds(folder, wanted) // whose first thread may be in another namespace than the socket
	}
}

// holds notes the sockets among those wanted that a process holds.
func holds(folder string, wanted map[uint32]*cause.Space) {
	open, err := os.ReadDir(folder + "/fd")
	if err != nil {
		return
	}
	for _, fd := range open {
		name, err := os.Readlink(folder + "/fd/" + fd.Name())
		number, socket := strings.CutPrefix(name, "socket:[")
		if err != nil || !socket {
			continue
		}
		inode, _ := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 32)
		space := wanted[uint32(inode)]
		if space == nil {
			continue
		}
		pid, _ := strconv.Atoi(folder[strings.LastIndexByte(folder, '/')+1:])
		command, _ := os.ReadFile(folder + "/comm")
		space.Processes[uint32(inode)] = cause.Process{PID: pid, Command: strings.TrimSpace(string(command)), Pod: space.Pod}
	}
}
