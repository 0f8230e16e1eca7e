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
	mostRemotes = 2000 // that are counted; one that many sockets have is met early
	mostBusy    = 8    // of them kept
	longQueue   = 4096 // bytes that a TCP socket has not read
)

// remote is what local ports are taken towards.
type remote struct {
	protocol uint8
	local    netip.Addr
	remote   netip.AddrPort
}

// sockets walks over those of the calling thread's namespace and keeps what can matter:
// first those that events are about, then those in trouble. drops are the counters of all
// that have dropped something.
func (r *Reader) sockets(name string, met *met) (kept []cause.Socket, busy []cause.Busy, drops map[uint64]uint64, err error) {
	taken := map[remote]int{}
	drops = map[uint64]uint64{}
	var ranked [ranks][]cause.Socket
	all, remotes := 0, false
	keep := func(s sockdiag.State) {
		if s.Remote.Port() != 0 && s.State != tcpListen {
			key := remote{s.Protocol, s.Local.Addr(), s.Remote}
			if _, known := taken[key]; known || len(taken) < mostRemotes {
				taken[key]++
			} else {
				remotes = true
			}
		}
		if s.Drops > 0 && len(drops) < mostDrops {
			drops[s.Cookie] = s.Drops
		}
		rank := met.rank(s)
		if rank < 0 {
			return
		}
		all++
		if len(ranked[rank]) < mostSockets {
			ranked[rank] = append(ranked[rank], socketOf(s))
		}
	}
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_RAW} {
		if e := sockdiag.Walk(protocol, keep); e != nil && protocol != unix.IPPROTO_RAW {
			err = e // raw sockets take a module that may be missing
		}
	}
	kept = slices.Concat(ranked[:]...)
	kept = slices.Clip(kept[:r.socketRoom.take(min(len(kept), mostSockets), leastSockets)])
	if len(kept) < all {
		r.note("sockets of %s: %d of %d that may matter are looked at, first those that events are about, then those in trouble", name, len(kept), all)
	}
	if remotes {
		r.note("how many local ports are taken in %s: only towards the %d remote ends that were met first", name, mostRemotes)
	}
	for key, ports := range taken {
		busy = append(busy, cause.Busy{Protocol: key.protocol, Local: key.local, Remote: key.remote, Ports: ports})
	}
	slices.SortFunc(busy, func(a, b cause.Busy) int { return b.Ports - a.Ports })
	return kept, slices.Clone(busy[:min(len(busy), mostBusy)]), drops, err
}

// ranks is how many there are of how much a socket may matter: 0 is the most.
const ranks = 3

// rank is how much a socket may matter; negative if it neither may be a cause nor may have
// met one.
func (m *met) rank(s sockdiag.State) int {
	open := s.State == tcpListen || s.Protocol != unix.IPPROTO_TCP && s.Remote.Port() == 0
	trouble := s.Drops > 0 || s.Protocol == unix.IPPROTO_TCP && s.State != tcpTimeWait &&
		(s.State == tcpListen && s.ReceiveQueue > 0 || s.State == tcpSynSent ||
			s.Timer == sockdiag.TimerProbe || s.Timer == sockdiag.TimerRetransmit && s.Tries > 0 ||
			s.TotalRetransmits > 0 || s.State != tcpListen && s.ReceiveQueue >= longQueue)
	switch {
	case m.sockets[s.Cookie] || open && m.ports[s.Local.Port()]:
		return 0
	case trouble, s.State == tcpEstablished && m.senders[s.Remote]:
		return 1
	case s.Protocol != unix.IPPROTO_TCP || s.State == tcpListen || s.State == tcpSynReceived:
		return 2
	}
	return -1
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
	var chosen []Namespace
	for inode := range waiting {
		chosen = append(chosen, r.spaces[r.at[inode]])
	}
	unread, err := each(ctx, chosen, func(n Namespace) map[uint64]bool {
		idle := map[uint64]bool{}
		err := sockdiag.Walk(unix.IPPROTO_TCP, func(now sockdiag.State) {
			if o := waiting[n.Inode][now.Cookie]; o != nil {
				idle[now.Cookie] = now.ReceiveQueue == o.ReceiveQueue && now.SendQueue == o.SendQueue &&
					now.BytesReceived == o.BytesReceived && now.BytesAcked == o.BytesAcked
			}
		})
		r.miss("sockets of "+n.Name+", a second time", err)
		return idle
	}, func(n Namespace, idle map[uint64]bool) {
		for cookie, is := range idle {
			waiting[n.Inode][cookie].Idle = is
		}
	})
	r.miss("sockets, a second time", err)
	if unread > 0 {
		r.note("sockets, a second time: of %d of %d network namespaces", len(chosen)-unread, len(chosen))
	}
}

// processes finds who holds the sockets of the evidence: every listener, UDP socket and
// connection that was kept. It walks over /proc once.
func (r *Reader) processes(ctx context.Context, e *cause.Evidence) {
	wanted := map[uint32]*cause.Space{}
	for _, s := range e.Spaces {
		s.Processes = map[uint32]cause.Process{}
		for i := range s.After.Sockets {
			if inode := s.After.Sockets[i].Inode; inode != 0 {
				wanted[inode] = s
			}
		}
	}
	folders, err := netns.Processes()
	if err != nil || len(wanted) == 0 {
		return
	}
	for i, folder := range folders {
		if ctx.Err() != nil {
			r.note("who holds sockets: %d of %d processes were looked at", i, len(folders))
			return
		}
		holds(ctx, folder, wanted) // whose first thread may be in another namespace than the socket
	}
}

// holds notes the sockets among those wanted that a process holds. One may hold very many.
func holds(ctx context.Context, folder string, wanted map[uint32]*cause.Space) {
	open, err := os.Open(folder + "/fd")
	if err != nil {
		return
	}
	defer open.Close()
	for ctx.Err() == nil {
		some, err := open.Readdirnames(1024)
		if err != nil {
			return
		}
		for _, fd := range some {
			name, err := os.Readlink(folder + "/fd/" + fd)
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
}
