package trace

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/perf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cpu"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/layer/trace/cause"
)

const act = "watch packets"

// Options say what is watched.
type Options struct {
	// Namespaces are inodes of network namespaces; none stands for all.
	Namespaces []uint32
	// Entries is how many different events are counted apart, each of them by each
	// processor; 0 stands for 8192, or less on a machine of many processors.
	Entries int
	// Calls looks at system calls that are refused, too: every call of every process on
	// this host then takes a quarter of a microsecond longer.
	Calls bool
	// From and To are the ends whose packets are asked for, in both directions; From alone
	// is either end, none of them all. What happened to others is seen as well, for it may
	// be the cause, but is not to push out what is asked for. At most MostRanges.
	From, To []Range
	// Filter says which of these are asked for; nil all.
	Filter *Filter
	// Packets is given every packet that died and was asked for, as far as MostPackets
	// reaches.
	Packets func(Packet)
	// Met is told of each namespace in which something happens, with the lower half of its
	// cookie, when the first example of each kind comes from there; it may not wait.
	Met func(space, cookie uint32)
	// Always watches as the layer does, all the time: what concerns packets and the ends of
	// connections, with the last examples kept in the kernel.
	Always bool
	// EveryDrop sends every drop to this process with its stack, instead of counting
	// in the kernel: to measure what that costs.
	EveryDrop bool
}

// Recording is what was seen.
type Recording struct {
	Events []cause.Event
	// Missing are the signals that this kernel does not give, and why.
	Missing []string
	// Lost are events that are in Totals but not in Events.
	Lost uint64
	// Received are events of which this process got an example of its own.
	Received uint64
	// Hops are how long packets that were asked for, and went on, took from one place to the
	// next where they were seen; where none were asked for there are none.
	Hops []cause.Passage
	// Totals are how many events of each kind and reason there were; none is ever lost.
	Totals []Total

	// Of Always alone: Examples are the last events of each kind, at most a few a second,
	// the newest first; Shares are packets that died by namespace and reason, Flows the
	// connections that have ended, of which FlowsLost are no more known.
	Examples  []cause.Event
	Shares    []Share
	Flows     []Flow
	FlowsLost uint64
}

// Total is how many events of a kind there were.
type Total struct {
	Kind   cause.Kind
	Reason string
	Count  uint64
}

// MostPackets is how many packets a second of each processor Options.Packets is given.
const MostPackets = 10_000

// Packet is one that died.
type Packet struct {
	At     time.Duration // from the beginning
	Space  uint32
	Device string
	// Reason and Location are as in cause.Event.
	Reason, Location string
	MAC              [6]byte
	EtherType        uint16
	Tuple            cause.Tuple
	// Data is from the network header on, and may be its beginning only; Length is of all.
	Data   []byte
	Length int
}

// Session watches until it is stopped.
type Session struct {
	collection *ebpf.Collection
	links      []link.Link
	reader     *perf.Reader
	done       sync.WaitGroup
	begun      time.Duration // of CLOCK_MONOTONIC, which the programs read too
	missing    []string
	reasons    reasons
	always     bool // what is read are the layer's maps

	mu       sync.Mutex // for what follows
	examples map[traceEventKey]*sample
	unread   uint64
	received uint64

	reachedMu     sync.Mutex // for what follows: how far counts were when they were read last
	reached       map[place]uint64
	reachedShares map[traceShareKey]uint64

	// Of the goroutine that reads, until done.
	packets func(Packet)
	met     func(space, cookie uint32)
	told    map[traceEventKey]bool // what met was told of
	names   map[uint64]string      // of functions, as far as packets died in them
}

// mostExamples bounds what a session keeps: each takes up to 3 kB.
const mostExamples = 8192

// Watch begins to watch. What it attaches is gone when the process ends, however it
// ends. The error is a *need.Privilege or a *need.Feature where that is the cause.
func Watch(o Options) (*Session, error) {
	if err := need.Check(act, "CAP_BPF", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	types := btf.NewCache()
	kernel, err := types.Kernel()
	if err != nil {
		return nil, &need.Feature{Act: act, Feature: fmt.Sprintf("type information (%v)", err), Since: "CONFIG_DEBUG_INFO_BTF"}
	}
	spec, err := loadTrace()
	if err != nil {
		return nil, err
	}
	s := &Session{always: o.Always, examples: map[traceEventKey]*sample{}}
	chosen, err := s.choose(kernel, spec, wanted(&o))
	if err != nil {
		return nil, err
	}
	if err := size(spec, &o); err != nil {
		return nil, err
	}
	if s.reasons, err = readReasons(kernel); err != nil {
		return nil, err
	}
	refused := func(p probe, why error) { s.miss(p.tracepoint, why) }
	if s.collection, err = load(spec, chosen, ebpf.CollectionOptions{Cache: types}, refused); err != nil {
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	if err := s.start(&o, chosen); err != nil {
		s.close()
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	return s, nil
}

// size sets the maps' sizes and the programs' settings.
func size(spec *ebpf.CollectionSpec, o *Options) error {
	processors, err := cpu.Online()
	if err != nil {
		return err
	}
	entries := o.Entries
	if entries == 0 {
		entries = max(1024, min(8192, 8192*16/processors)) // 10 MB at most
	}
	spec.Maps[traceMapEvents].MaxEntries = uint32(entries)
	ends := ends(o)
	if ends == 0 {
		for _, name := range []string{traceMapSides, traceMapFlights, traceMapHops} {
			spec.Maps[name].MaxEntries = 1
		}
	}
	if ends > 0 || o.Filter != nil {
		spec.Maps[traceMapBeside].MaxEntries = uint32(entries)
	} else {
		spec.Maps[traceMapBeside].MaxEntries = 1
	}
	settings := map[string]any{
		traceVarChosen: len(o.Namespaces) > 0, traceVarEach: o.EveryDrop, traceVarPackets: o.Packets != nil,
		traceVarEnds: ends, traceVarKeeps: o.Always,
		traceVarCallConnect: uint32(unix.SYS_CONNECT), traceVarCallBind: uint32(unix.SYS_BIND),
		traceVarCallSendto: uint32(unix.SYS_SENDTO), traceVarCallSendmsg: uint32(unix.SYS_SENDMSG),
		traceVarCallSendmmsg: uint32(unix.SYS_SENDMMSG), traceVarCallWrite: uint32(unix.SYS_WRITE),
		traceVarCallWritev: uint32(unix.SYS_WRITEV),
	}
	if o.Filter != nil {
		var steps [mostTests]traceStep
		settings[traceVarFilterSteps] = uint32(copy(steps[:], o.Filter.steps))
		settings[traceVarFilter] = steps
	}
	if o.Packets != nil {
		settings[traceVarExamplesA_second] = uint32(MostPackets)
	}
	if o.Always {
		settings[traceVarExamplesA_second] = uint32(alwaysExamples)
	} else {
		for _, name := range alwaysMaps {
			spec.Maps[name].MaxEntries = 1
		}
	}
	for name, value := range settings {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// load loads the chosen programs: all at once, or, where the kernel refuses one, each
// that it does not refuse; refused is told of the others. The error is of the last one,
// where it refuses all.
func load(spec *ebpf.CollectionSpec, chosen []probe, options ebpf.CollectionOptions, refused func(probe, error)) (*ebpf.Collection, error) {
	keep := map[string]bool{}
	for _, p := range chosen {
		keep[p.name] = true
	}
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return !keep[name] })
	all, err := ebpf.NewCollectionWithOptions(spec, options)
	if err == nil || errors.Is(err, unix.EPERM) {
		return all, err
	}
	var loaded *ebpf.Collection
	for _, p := range chosen {
		one := spec.Copy()
		maps.DeleteFunc(one.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != p.name })
		if loaded != nil {
			options.MapReplacements = loaded.Maps
		}
		with, why := ebpf.NewCollectionWithOptions(one, options)
		if why != nil {
			refused(p, why)
			continue
		}
		if loaded == nil {
			loaded = with
			continue
		}
		loaded.Programs[p.name] = with.Programs[p.name]
		delete(with.Programs, p.name)
		with.Close()
	}
	if loaded == nil {
		return nil, err
	}
	return loaded, nil
}

func (s *Session) miss(tracepoint string, err error) {
	s.missing = append(s.missing, fmt.Sprintf("%s: %v", tracepoint, err))
}

// start fills in whom to look at and attaches the programs.
func (s *Session) start(o *Options, chosen []probe) error {
	for _, inode := range o.Namespaces {
		if err := s.collection.Maps[traceMapWanted].Put(inode, uint8(1)); err != nil {
			return fmt.Errorf("choose namespace %d: %w", inode, err)
		}
	}
	if err := putSides(s.collection.Maps[traceMapSides], o); err != nil {
		return err
	}
	options := perf.ReaderOptions{}
	pages := 32
	if o.EveryDrop || o.Packets != nil {
		pages = 256 // as much as such a tracer asks for
		options.Watermark = pages * os.Getpagesize() / 4
	}
	var err error
	if s.reader, err = perf.NewReaderWithOptions(s.collection.Maps[traceMapExamples], pages*os.Getpagesize(), options); err != nil {
		return fmt.Errorf("read examples: %w", err)
	}
	if s.begun, err = now(); err != nil {
		return err
	}
	s.packets, s.names = o.Packets, map[uint64]string{}
	s.met, s.told = o.Met, map[traceEventKey]bool{}
	if o.EveryDrop {
		s.done.Go(s.countEvery)
	} else {
		s.done.Go(s.readExamples)
	}
	for _, p := range chosen {
		loaded := s.collection.Programs[p.name]
		if loaded == nil {
			continue
		}
		attached, err := link.AttachTracing(link.TracingOptions{Program: loaded})
		if err != nil {
			s.miss(p.tracepoint, err)
			continue
		}
		s.links = append(s.links, attached)
	}
	if len(s.links) == 0 {
		return fmt.Errorf("no program could be attached: %s", s.missing)
	}
	return nil
}

func now() (time.Duration, error) {
	var at unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &at); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return time.Duration(at.Nano()), nil
}

// countEvery only counts what arrives.
func (s *Session) countEvery() {
	for {
		record, err := s.reader.Read()
		if err != nil {
			return
		}
		s.arrived(record.LostSamples, record.LostSamples == 0)
	}
}

// Look says what was seen until now, and goes on.
func (s *Session) Look() (*Recording, error) { return s.record() }

// Stop ends watching and says what was seen.
func (s *Session) Stop() (*Recording, error) {
	defer s.close()
	for _, l := range s.links {
		l.Close()
	}
	s.links = nil
	if err := s.reader.Flush(); err != nil {
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	s.done.Wait()
	return s.record()
}

func (s *Session) close() {
	for _, l := range s.links {
		l.Close()
	}
	s.links = nil
	if s.reader != nil {
		s.reader.Close()
		s.done.Wait()
	}
	if s.collection != nil {
		s.collection.Close()
	}
}

// probe is one program of trace.bpf.c, with the tracepoint that it is for.
type probe struct {
	name, tracepoint string
	// arguments are the kernel's types of the tracepoint's arguments, in their order,
	// as far as the program reads them; "" for those of no matter.
	arguments []string
}

var probes = []probe{
	{traceProgDrop, "kfree_skb", []string{"sk_buff"}},
	{traceProgReset, "tcp_send_reset", []string{"sock", "sk_buff"}},
	{traceProgIcmp, "icmp_send", []string{"sk_buff", "", ""}},
	{traceProgRetransmit, "tcp_retransmit_skb", []string{"sock", "sk_buff"}},
	{traceProgRepeatSynack, "tcp_retransmit_synack", []string{"sock", "request_sock"}},
	{traceProgSocketError, "inet_sk_error_report", []string{"sock"}},
	{traceProgNeighbour, "neigh_timer_handler", []string{"neighbour"}},
	{traceProgQueueFull, "sock_rcvqueue_full", []string{"sock"}},
	{traceProgUdpFull, "udp_fail_queue_rcv_skb", []string{"", "sock"}},
	{traceProgBadChecksum, "tcp_bad_csum", []string{"sk_buff"}},
	{traceProgState, "inet_sock_set_state", []string{"sock", "", ""}},
	{traceProgCall, "sys_exit", []string{"pt_regs", ""}},
	{traceProgEnd, "inet_sock_set_state", []string{"sock", "", ""}},
	{traceProgCame, "netif_receive_skb", []string{"sk_buff"}},
	{traceProgQueued, "net_dev_queue", []string{"sk_buff"}},
	{traceProgLeft, "net_dev_start_xmit", []string{"sk_buff"}},
}

// onTheWay are the programs that see packets that are well: each one on this host, so
// that they are in force only where somebody asks about some.
var onTheWay = []string{traceProgCame, traceProgQueued, traceProgLeft}

// wanted are the programs that are asked for.
func wanted(o *Options) []probe {
	if o.Always {
		return lasting()
	}
	return slices.DeleteFunc(slices.Clone(probes), func(p probe) bool {
		return p.name == traceProgCall && !o.Calls || p.name == traceProgEnd || slices.Contains(onTheWay, p.name) && ends(o) == 0
	})
}

// choose finds which tracepoints the kernel has, with the arguments that our programs
// read.
func (s *Session) choose(kernel *btf.Spec, spec *ebpf.CollectionSpec, wanted []probe) (chosen []probe, err error) {
	for _, p := range wanted {
		less, err := adapt(kernel, spec, p)
		if err != nil {
			s.miss(p.tracepoint, err)
			continue
		}
		if less != "" {
			s.missing = append(s.missing, p.tracepoint+": "+less)
		}
		chosen = append(chosen, p)
	}
	if len(chosen) == 0 {
		return nil, &need.Feature{Act: act, Feature: fmt.Sprintf("tracepoints for it (%v)", s.missing), Since: "CONFIG_TRACEPOINTS"}
	}
	return chosen, nil
}

// adapt tells a program which of its tracepoint's arguments the kernel has. The error
// is a *missing where it has not those that the program reads; less is what it sees less of.
func adapt(kernel *btf.Spec, spec *ebpf.CollectionSpec, p probe) (less string, err error) {
	have, err := argumentsOf(kernel, p.tracepoint)
	if err != nil {
		return "", &missing{err.Error()}
	}
	if !fits(have, p.arguments) {
		return "", &missing{fmt.Sprintf("this kernel's has other arguments: %v", have)}
	}
	settings := map[string]int{}
	switch p.name {
	case traceProgDrop:
		settings[traceVarDropReason] = slices.Index(have, "skb_drop_reason")
		settings[traceVarDropReceiver] = slices.Index(have, "sock")
		if settings[traceVarDropReason] != 2 {
			less = "this kernel gives no reasons; functions and counters have to do"
		}
	case traceProgReset:
		settings[traceVarResetReason] = slices.Index(have, "sk_rst_reason")
	}
	for name, place := range settings {
		if err := spec.Variables[name].Set(int32(place)); err != nil {
			return "", fmt.Errorf("set %s: %w", name, err)
		}
	}
	return less, nil
}

func fits(have, wanted []string) bool {
	if len(have) < len(wanted) {
		return false
	}
	for i, name := range wanted {
		if name != "" && have[i] != name {
			return false
		}
	}
	return true
}

// argumentsOf are the names of the types of a tracepoint's arguments, pointers and
// const left out.
func argumentsOf(kernel *btf.Spec, tracepoint string) ([]string, error) {
	var typedef *btf.Typedef
	if err := kernel.TypeByName("btf_trace_"+tracepoint, &typedef); errors.Is(err, btf.ErrNotFound) {
		return nil, errors.New("this kernel has no such tracepoint")
	} else if err != nil {
		return nil, err
	}
	pointer, _ := btf.UnderlyingType(typedef).(*btf.Pointer)
	if pointer == nil {
		return nil, errors.New("its type is not known")
	}
	prototype, _ := pointer.Target.(*btf.FuncProto)
	if prototype == nil || len(prototype.Params) == 0 {
		return nil, errors.New("its type is not known")
	}
	var names []string
	for _, param := range prototype.Params[1:] { // the first is the kernel's own
		of := btf.UnderlyingType(param.Type)
		if pointer, ok := of.(*btf.Pointer); ok {
			of = btf.UnderlyingType(pointer.Target)
		}
		names = append(names, of.TypeName())
	}
	return names, nil
}
