package fault

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
)

// programNames are as others call theirs.
var programNames = []string{"drop_by_policy", "cil_from_netdev", "guard", "acl", "fw_ingress", "filter"}

// destined is a program that gives one verdict for packets to an address and another for
// all else; at is where in the packet the address is, and direct that it is read there.
func (p *Part) destined(kind ebpf.ProgramType, at int32, hit, other int32) (*ebpf.Program, error) {
	want := p.to.AsSlice()
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	direct := kind == ebpf.XDP
	if direct {
		code = append(code,
			asm.LoadMem(asm.R2, asm.R6, 0, asm.Word), asm.LoadMem(asm.R3, asm.R6, 4, asm.Word),
			asm.Mov.Reg(asm.R4, asm.R2), asm.Add.Imm(asm.R4, at+int32(len(want))), asm.JGT.Reg(asm.R4, asm.R3, "other"))
	} else {
		code = append(code,
			asm.Mov.Imm(asm.R2, at), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -16),
			asm.Mov.Imm(asm.R4, int32(len(want))), asm.FnSkbLoadBytes.Call(), asm.JNE.Imm(asm.R0, 0, "other"))
	}
	for i := 0; i < len(want); i += 4 {
		from, offset := asm.RFP, int16(-16+i)
		if direct {
			from, offset = asm.R2, int16(at)+int16(i)
		}
		code = append(code, asm.LoadMem(asm.R5, from, offset, asm.Word),
			asm.LoadImm(asm.R4, int64(native.Uint32(want[i:])), asm.DWord), asm.JNE.Reg(asm.R5, asm.R4, "other"))
	}
	code = append(code, asm.Mov.Imm(asm.R0, hit), asm.Return(), asm.Mov.Imm(asm.R0, other).WithSymbol("other"), asm.Return())
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: programNames[p.random.IntN(len(programNames))], Type: kind, Instructions: code, License: "GPL"})
	if err != nil {
		return nil, fmt.Errorf("load a program: %w", err)
	}
	p.atEnd(func() { program.Close() })
	return program, nil
}

// address is where the destination is in a packet that begins with an Ethernet header,
// or without one.
func (p *Part) address(header int32) int32 {
	if p.six {
		return header + 24
	}
	return header + 16
}

// byTC drops at a device of the router, to it or from it.
func byTC(egress bool) func(*Part) error {
	return serving(func(p *Part) error {
		const shot, unspecified = 2, -1 // of tcx, the second is to go on
		device := p.router.device
		if egress {
			device = p.router.far
		}
		at := p.router
		if p.draw(2) == 1 {
			at, device = p.server, p.server.device
			if egress {
				at, device = p.client, p.client.device
			}
		}
		p.blame(at)
		program, err := p.destined(ebpf.SchedCLS, p.address(14), shot, unspecified)
		if err != nil {
			return err
		}
		if p.draw(2) == 1 {
			return p.tcx(at, device, program, egress)
		}
		index := at.index(device)
		clsact := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		parent := uint32(netlink.HANDLE_MIN_INGRESS)
		if egress {
			parent = netlink.HANDLE_MIN_EGRESS
		}
		filter := &netlink.BpfFilter{Fd: program.FD(), Name: "filter", DirectAction: true, FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1}}
		if err := at.net.QdiscAdd(clsact); err != nil {
			return fmt.Errorf("add clsact to %s: %w", device, err)
		}
		if err := at.net.FilterAdd(filter); err != nil {
			return fmt.Errorf("add a filter to %s: %w", device, err)
		}
		return nil
	})
}

func (p *Part) tcx(at *space, device string, program *ebpf.Program, egress bool) error {
	attach := ebpf.AttachTCXIngress
	if egress {
		attach = ebpf.AttachTCXEgress
	}
	return at.do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: at.index(device), Program: program, Attach: attach})
		if err == nil {
			p.atEnd(func() { l.Close() })
		}
		return err
	})
}

// byXDP drops where a device receives; generic is that of the stack.
func byXDP(generic bool) func(*Part) error {
	return serving(func(p *Part) error {
		const drop, pass = 1, 2
		at, device := p.router, p.router.device
		if p.draw(2) == 1 {
			at, device = p.server, p.server.device
		}
		p.blame(at)
		program, err := p.destined(ebpf.XDP, p.address(14), drop, pass)
		if err != nil {
			return err
		}
		l, err := at.link(device)
		if err != nil {
			return err
		}
		flags := unix.XDP_FLAGS_DRV_MODE
		if generic {
			flags = unix.XDP_FLAGS_SKB_MODE
		}
		if err := at.do(func() error { return netlink.LinkSetXdpFdWithFlags(l, program.FD(), flags) }); err != nil {
			return fmt.Errorf("attach XDP to %s: %w", device, err)
		}
		return nil
	})
}

// groupsFolder is below the root of cgroups.
const groupsFolder = "millrace-fault"

// byCgroup drops what processes of a group send.
func byCgroup(p *Part) error {
	p.blame(p.client)
	root, err := cgroup.Root()
	if err != nil {
		return err
	}
	parent := root + "/" + groupsFolder
	p.group = parent + "/" + p.client.name
	if err := cgroup.Create(p.group); err != nil {
		return err
	}
	p.atEnd(func() {
		p.wrong(cgroup.Remove(p.group))
		os.Remove(parent) // others may have groups there
	})
	program, err := p.destined(ebpf.CGroupSKB, p.address(0), 0, 1)
	if err != nil {
		return err
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: p.group, Attach: ebpf.AttachCGroupInetEgress, Program: program})
	if err != nil {
		return fmt.Errorf("attach to %s: %w", p.group, err)
	}
	p.atEnd(func() { l.Close() })
	return nil
}

// fromGroup asks from a process in the group.
func fromGroup(ctx context.Context, p *Part) {
	cmd := exec.CommandContext(ctx, p.worker[0], append(p.worker[1:], p.from.String(), p.target(), strconv.Itoa(p.attempts))...)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = netns.Start(p.client.path, p.group, cmd)
	}
	if err != nil {
		p.wrong(fmt.Errorf("start a client in %s: %w", p.group, err))
		return
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		p.saw(Outcome(lines.Text()))
	}
	if err := cmd.Wait(); err != nil && ctx.Err() == nil {
		p.wrong(fmt.Errorf("client in %s: %w", p.group, err))
	}
}

// WorkerMain is a client in a process of its own: ADDRESS TARGET N asks N times and
// prints what it saw each time.
func WorkerMain(args []string) int {
	if err := ask(os.Stdout, args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func ask(out io.Writer, args []string) error {
	if len(args) != 3 {
		return errors.New("say ADDRESS TARGET N")
	}
	from, err := netip.ParseAddr(args[0])
	if err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	p := &Part{scene: &scene{client: &space{path: "/proc/self/ns/net"}}, from: from, to: to.Addr(), port: to.Port()}
	for range n {
		fmt.Fprintln(out, p.ask(context.Background(), 64))
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

// hookOf says which of a device's ways, for the list.
func hookOf(egress bool) string {
	if egress {
		return "from"
	}
	return "to"
}

// tcFault is a fault of a program of tc.
func tcFault(name, number string, egress bool) *Fault {
	return &Fault{Name: name, Number: number, Says: "An eBPF program of tc drops what goes " + hookOf(egress) + " a device.",
		Causes: []string{"bpf-tc-drop"}, Seen: []Outcome{Timeout, Silent, NoBuffers}, induce: byTC(egress), send: callsOrQuestions}
}

var programFaults = []*Fault{
	tcFault("tc-ingress-drop", "15", false),
	tcFault("tc-egress-drop", "15b", true),
	{Name: "xdp-drop", Number: "16", Says: "An XDP program drops, in the device's own way.",
		Causes: []string{"bpf-xdp-drop"}, Seen: []Outcome{Timeout, Silent}, induce: byXDP(false), send: callsOrQuestions},
	{Name: "xdp-generic-drop", Number: "16b", Says: "An XDP program drops, in the stack's way, which nothing counts.",
		Causes: []string{"bpf-xdp-drop"}, Seen: []Outcome{Timeout, Silent}, induce: byXDP(true), send: callsOrQuestions},
	{Name: "cgroup-drop", Number: "34", Says: "An eBPF program of a cgroup drops what its processes send.",
		Causes: []string{"bpf-cgroup-drop"}, Seen: []Outcome{NotAllowed}, induce: serving(byCgroup), send: fromGroup},
}
