package trace

import (
	"context"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/layer/trace/cause"
)

// of linux/pkt_cls.h
const (
	clsactIngress = 0xfffffff2 // TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
	clsactEgress  = 0xfffffff3
	bpfOps        = 5  // TCA_BPF_OPS, of a classic program
	bpfName       = 7  // TCA_BPF_NAME
	bpfID         = 11 // TCA_BPF_ID
)

// attachedTo lists the eBPF programs, and other filters of tc, that packets meet at the
// devices of the calling thread's namespace.
func attachedTo(devices []device) (all []cause.Program) {
	for i := range devices {
		l := &devices[i]
		all = append(all, l.express()...)
		for _, q := range l.Qdiscs {
			if q.Kind == "clsact" || q.Kind == "ingress" {
				all = append(all, filters(l, clsactIngress, "tc ingress")...)
				all = append(all, filters(l, clsactEgress, "tc egress")...)
				break
			}
		}
		for attach, hook := range map[ebpf.AttachType]string{ebpf.AttachTCXIngress: "tc ingress", ebpf.AttachTCXEgress: "tc egress"} {
			found, err := link.QueryPrograms(link.QueryOptions{Target: l.Index, Attach: attach})
			if err != nil {
				continue // before Linux 6.6
			}
			for _, p := range found.Programs {
				all = append(all, attached(p.ID, "sched_cls", hook, l.Name))
			}
		}
	}
	return all
}

// express is the XDP program of a device.
func (d *device) express() []cause.Program {
	const generic = 2 // XDP_ATTACHED_SKB
	if d.xdp == nil || !d.xdp.Attached {
		return nil
	}
	hook := "xdp"
	if d.xdp.AttachMode == generic {
		hook = "xdp generic"
	}
	return []cause.Program{attached(ebpf.ProgramID(d.xdp.ProgId), "xdp", hook, d.Name)}
}

// attached tells of one by its number.
func attached(id ebpf.ProgramID, kind, hook, device string) cause.Program {
	p := cause.Program{ID: uint32(id), Type: kind, Hook: hook, Device: device}
	handle, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return p
	}
	defer handle.Close()
	if info, err := handle.Info(); err == nil {
		p.Name = info.Name
		p.Owner = ownerOf(info.Name)
	}
	return p
}

// services are the names of millrace's own programs for Services.
var services = []string{"from_pod", "to_pod", "from_wire", "to_wire", "from_wire_l3", "to_wire_l3", "connect4", "connect6", "sendmsg4", "sendmsg6"}

// pinned is where millrace keeps what stays when it ends.
const pinned = "/sys/fs/bpf/millrace"

// ownerOf is whose programs begin like that.
func ownerOf(name string) string {
	for prefix, owner := range map[string]string{"cil_": "cilium", "tail_": "cilium", "cali_": "calico", "calico_": "calico"} {
		if strings.HasPrefix(name, prefix) {
			return owner
		}
	}
	if _, err := os.Stat(pinned); err == nil && slices.Contains(services, name) {
		return "millrace"
	}
	return ""
}

// filters lists those of tc at one side of a device.
func filters(l *device, parent uint32, hook string) (all []cause.Program) {
	ask := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, unix.NLM_F_DUMP)
	ask.AddData(&nl.TcMsg{Ifindex: int32(l.Index), Parent: parent})
	replies, err := ask.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWTFILTER)
	if err != nil {
		return nil
	}
	for _, reply := range replies {
		if len(reply) < sizeOfTcmsg {
			continue
		}
		raw := reply[sizeOfTcmsg:]
		kind := strings.TrimRight(string(inner(raw, tcaKind)), "\x00")
		pref := binary.NativeEndian.Uint32(reply[16:]) >> 16 // tcm_info: priority and protocol
		options := inner(raw, tcaOptions)
		switch id := inner(options, bpfID); {
		case len(id) == 4:
			p := attached(ebpf.ProgramID(binary.NativeEndian.Uint32(id)), "sched_cls", hook, l.Name)
			if p.Name == "" {
				p.Name = strings.TrimRight(string(inner(options, bpfName)), "\x00")
			}
			p.Pref = pref
			all = append(all, p)
		case kind == "bpf" && len(inner(options, bpfOps)) > 0:
			all = append(all, cause.Program{Name: "classic BPF", Type: kind, Hook: hook, Device: l.Name, Pref: pref})
		case kind == "bpf": // its group, without a program
		case !slices.ContainsFunc(all, func(p cause.Program) bool { return p.Type == kind && p.Pref == pref }):
			all = append(all, cause.Program{Name: kind, Type: kind, Hook: hook, Device: l.Name, Pref: pref})
		}
	}
	return all
}

// cgroupHooks are the places in a cgroup where a program can refuse, and what bpftool(8)
// calls them.
var cgroupHooks = map[ebpf.AttachType]struct{ hook, name string }{
	ebpf.AttachCGroupInetIngress:    {"cgroup ingress", "ingress"},
	ebpf.AttachCGroupInetEgress:     {"cgroup egress", "egress"},
	ebpf.AttachCGroupInet4Connect:   {"cgroup connect", "connect4"},
	ebpf.AttachCGroupInet6Connect:   {"cgroup connect", "connect6"},
	ebpf.AttachCGroupUDP4Sendmsg:    {"cgroup sendmsg", "sendmsg4"},
	ebpf.AttachCGroupUDP6Sendmsg:    {"cgroup sendmsg", "sendmsg6"},
	ebpf.AttachCGroupInetSockCreate: {"cgroup sock_create", "sock_create"},
	ebpf.AttachCGroupInet4Bind:      {"cgroup bind", "bind4"},
	ebpf.AttachCGroupInet6Bind:      {"cgroup bind", "bind6"},
}

// mostCgroups is how many are asked for their programs.
const mostCgroups = 5000

// cgroups notes the programs of cgroups that have processes in a space where one of them
// may have refused something. Only then it looks.
func (r *Reader) cgroups(ctx context.Context, e *cause.Evidence) {
	suspects := map[uint32]*cause.Space{}
	for _, event := range e.Events {
		refused := event.Reason == "BPF_CGROUP_EGRESS" || event.Reason == "SOCKET_FILTER" ||
			event.Kind == cause.CallFailed && event.Errno == int(unix.EPERM)
		at := slices.IndexFunc(e.Spaces, func(s *cause.Space) bool { return refused && s.Inode == event.Space })
		if at >= 0 {
			suspects[event.Space] = e.Spaces[at]
		}
	}
	root, err := cgroup.Root()
	if len(suspects) == 0 || err != nil {
		return // without cgroup2 there are none
	}
	left := mostCgroups
	of := map[uint32]map[uint64]bool{}
	for inode, s := range suspects {
		of[inode] = cgroupsOf(s)
	}
	near := map[uint32][]cause.Program{} // of cgroups that have to do with a space
	var all []cause.Program
	_ = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil
		}
		if left--; left < 0 || ctx.Err() != nil {
			r.note("programs of cgroups: no more than %d cgroups are asked, for no longer than %s", mostCgroups, longestReading)
			return filepath.SkipAll
		}
		found := cgroupPrograms(name)
		if len(found) == 0 {
			return nil
		}
		all = append(all, found...)
		for inode := range suspects {
			if name == root || holdsAny(name, of[inode]) || concerns(name, inode) {
				near[inode] = append(near[inode], found...)
			}
		}
		return nil
	})
	for inode, s := range suspects {
		if len(near[inode]) == 0 {
			near[inode] = all // whoever it was has ended: it is one of these
		}
		s.Programs = append(s.Programs, near[inode]...)
	}
}

// cgroupsOf are the cgroups, by inode, of the sockets of a space.
func cgroupsOf(s *cause.Space) map[uint64]bool {
	of := map[uint64]bool{}
	for _, socket := range s.After.Sockets {
		of[socket.Cgroup] = true
	}
	delete(of, 0)
	delete(of, 1) // the root has everybody
	return of
}

// holdsAny says whether a cgroup, or one below it, is among those.
func holdsAny(folder string, inodes map[uint64]bool) bool {
	found := false
	_ = filepath.WalkDir(folder, func(name string, entry fs.DirEntry, err error) error {
		var file unix.Stat_t
		if err == nil && entry.IsDir() && unix.Stat(name, &file) == nil && inodes[file.Ino] {
			found = true
			return filepath.SkipAll
		}
		return nil
	})
	return found
}

func cgroupPrograms(folder string) (all []cause.Program) {
	fd, err := unix.Open(folder, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	for attach, place := range cgroupHooks {
		found, err := link.QueryPrograms(link.QueryOptions{Target: fd, Attach: attach})
		if err != nil {
			continue
		}
		for _, f := range found.Programs {
			p := attached(f.ID, "cgroup", place.hook, "")
			p.Cgroup, p.Attach = folder, place.name
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b cause.Program) int { return int(a.ID) - int(b.ID) })
	return all
}

// concerns says whether a process of a cgroup, or of one below it, is in a namespace.
func concerns(folder string, inode uint32) bool {
	found := false
	_ = filepath.WalkDir(folder, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil
		}
		pids, _ := os.ReadFile(filepath.Join(name, "cgroup.procs"))
		for _, pid := range strings.Fields(string(pids)) {
			var file unix.Stat_t
			if unix.Stat("/proc/"+pid+"/ns/net", &file) == nil && uint32(file.Ino) == inode {
				found = true
				return filepath.SkipAll
			}
		}
		return nil
	})
	return found
}
