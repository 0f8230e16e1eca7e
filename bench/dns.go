package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// DNSOptions are what a person can choose for DNS.
type DNSOptions struct {
	// Rounds is how often each variant has its turn, RoundTime how long one lasts, all
	// operations together; 0 is DNSRounds and DNSRoundTime.
	Rounds    int
	RoundTime time.Duration
	// Attach serves the variants under test.
	Attach DNSAttach
	// CoreDNS is the path of a CoreDNS with the plugins cache and forward; empty: that of
	// the cache folder, which is built if it is not there.
	CoreDNS string
	// WorkerCommand is the command that runs WorkerMain, to which its arguments are
	// appended; this program with "bench-worker".
	WorkerCommand []string
	// Progress receives a line for everything that takes time; nothing.
	Progress io.Writer
}

// What DNSOptions has where nothing is said: a round holds every operation of every
// variant, and within one a burst of other load meets some and not others.
const (
	DNSRounds    = 20
	DNSRoundTime = 560 * time.Millisecond
)

// The variants of DNS.
const (
	// MillraceList is Millrace where the pod's search list is not collapsed, because two
	// processes of it see different ones.
	MillraceList = "millrace-list"
	// CoreDNS is one with cache and forward, as a cache on the node has it.
	CoreDNS = "coredns"
	// Unbound is one that forwards, with a thread for each of the two processors.
	Unbound = "unbound"
)

// The operations of DNS.
const (
	// Query is one question for an address of a Service, and its answer.
	Query = "query"
	// Flood is as many of them as client and server manage on two processors.
	Flood = "flood"
	// Pairs is the lookup of a name outside, by a client that sends what glibc's
	// getaddrinfo sends: A and AAAA together for each candidate of the search list, from a
	// socket of its own.
	Pairs = "pairs"
	// Glibc, Musl and Go are the same lookup by the real ones.
	Glibc = "glibc"
	Musl  = "musl"
	Go    = "go"
)

var dnsOperations = []string{Query, Flood, Pairs, Glibc, Musl, Go}

// Metrics of DNS beside p50, p99 and count.
const (
	metricClient  = " client CPU"
	metricServer  = " server CPU"
	metricQueries = " queries"
)

// MetricClient and MetricServer are the processor time of the client and of the servers
// for one operation, in microseconds, with all that the kernel did for it.
func MetricClient(operation string) string { return operation + metricClient }

// MetricServer is described with MetricClient.
func MetricServer(operation string) string { return operation + metricServer }

// MetricQueries is how many queries an operation sent, on average.
func MetricQueries(operation string) string { return operation + metricQueries }

// DNSAttach serves names for the pods of a node, and returns when it does.
type DNSAttach func(DNSSpec) (DNSAttached, error)

// DNSSpec is what a variant under test works with.
type DNSSpec struct {
	// NetNS is the path of the node's network namespace.
	NetNS string
	// Zone is the cluster's domain, and Service the address of its DNS Service.
	Zone    string
	Service netip.Addr
	// Services are the cluster's by what stands before the zone.
	Services map[string]netip.Addr
	// Outside are the names of others, with an IPv4 address and none of IPv6: with two
	// addresses a C library sorts them, which takes it longer than the answer does.
	Outside map[string]netip.Addr
}

// DNSAttached is a variant under test, at work.
type DNSAttached struct {
	// Pid is the process that serves.
	Pid int
	// Close takes everything away again.
	Close func() error
}

// DNS measures what an answer costs and what a lookup of a name outside costs, from a
// pod: by millrace in the kernel, and by a CoreDNS and an unbound on the node that have all
// of it in their caches. It needs root. It ends early, and leaves nothing, when ctx ends. A
// server or a library that is not to be had is left out and named in the report.
func DNS(ctx context.Context, o DNSOptions) (report *Report, err error) {
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	if err := need.Check("make network namespaces", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return nil, err
	}
	cpus, err := lastProcessors(2)
	if err != nil {
		return nil, err
	}
	run, err := openRun()
	if err != nil {
		return nil, err
	}
	s := &dnsSession{DNSOptions: o, run: run, cpus: cpus, report: &Report{
		Header: newHeader("dns", map[string]string{
			"rounds": fmt.Sprint(o.Rounds), "time per round": o.RoundTime.String(), "processors": fmt.Sprintf("client and server on %s", joined(cpus)),
		}), Rows: []Row{}, Skipped: []Skipped{}, Warnings: []string{},
	}}
	if err := carryOut(ctx, s, s.close); err != nil {
		return nil, err
	}
	s.summarize()
	return s.report, nil
}

func (o DNSOptions) withDefaults() (_ DNSOptions, err error) {
	if err := checkRounds(o.Rounds, o.RoundTime); err != nil {
		return o, err
	}
	if o.Rounds == 0 {
		o.Rounds = DNSRounds
	}
	if o.RoundTime == 0 {
		o.RoundTime = DNSRoundTime
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if len(o.WorkerCommand) == 0 {
		o.WorkerCommand, err = ownWorker()
	}
	return o, err
}

// dnsSession is one run of DNS.
type dnsSession struct {
	DNSOptions
	run    *run
	cpus   []int
	report *Report
	town   *dnsTown
	cells  []*dnsCell
	// operations are those that can be measured here.
	operations []string
}

// dnsCell is a variant: a pod, the address that its resolv.conf names, and whoever
// answers there.
type dnsCell struct {
	variant string
	pod     *dnsPod
	// servers are the processes whose time counts.
	servers []int
	// clients are by operation; one may have several.
	clients map[string]*process
	samples map[string][]float64
}

func (s *dnsSession) progress(format string, args ...any) {
	fmt.Fprintf(s.Progress, "bench dns: "+format+"\n", args...)
}

func (s *dnsSession) skip(variant, reason string, args ...any) {
	skipped := Skipped{Variant: variant, Reason: fmt.Sprintf(reason, args...)}
	s.report.Skipped = append(s.report.Skipped, skipped)
	s.progress("%s", skipped)
}

// prepare makes the node and its pods, starts who answers, and proves that they do.
func (s *dnsSession) prepare(ctx context.Context) error {
	programs, err := s.programs(ctx)
	if err != nil {
		return err
	}
	s.progress("prepare namespaces and servers")
	if s.town, err = newTown(ctx, s.run, s.WorkerCommand, s.cpus); err != nil {
		return err
	}
	cells, err := s.serve(ctx, programs)
	if err != nil {
		return err
	}
	for _, c := range cells {
		if err := s.startClients(ctx, c, programs); err != nil {
			return err
		}
	}
	for _, c := range cells {
		if err := s.prove(ctx, c); err != nil {
			return fmt.Errorf("%s: %w", c.variant, err)
		}
	}
	s.cells = cells
	return nil
}

// serve starts the servers, and what is under test where they are already: the names that
// it leaves go to CoreDNS, or to unbound where there is none.
func (s *dnsSession) serve(ctx context.Context, programs map[string]string) (cells []*dnsCell, err error) {
	var behind []int
	for _, name := range []string{CoreDNS, Unbound} {
		if programs[name] == "" {
			continue
		}
		first := len(behind) == 0
		pid, err := s.town.startServer(ctx, name, programs[name], first)
		if err != nil {
			return nil, err
		}
		if first {
			behind = []int{pid}
		}
		cells = append(cells, newCell(name, s.town.pods[name], pid))
	}
	if len(behind) == 0 {
		return nil, errors.New("neither CoreDNS nor unbound is to be had, and nothing can be compared: name a CoreDNS (`millrace bench dns PATH`), or install Go or unbound")
	}
	attached, err := s.Attach(s.town.spec())
	if err != nil {
		return nil, err
	}
	s.town.attached = append(s.town.attached, attached.Close)
	servers := append([]int{attached.Pid}, behind...)
	ours := []*dnsCell{newCell(Millrace, s.town.pods[Millrace], servers...), newCell(MillraceList, s.town.pods[MillraceList], servers...)}
	return append(ours, cells...), nil
}

func newCell(variant string, pod *dnsPod, servers ...int) *dnsCell {
	return &dnsCell{variant: variant, pod: pod, servers: servers, clients: map[string]*process{}, samples: map[string][]float64{}}
}

// startClients starts the processes that ask in a cell's pod.
func (s *dnsSession) startClients(ctx context.Context, c *dnsCell, programs map[string]string) error {
	if c.pod.other != "" {
		if _, err := s.town.startWith(ctx, c.pod, c.pod.other, "another of "+c.variant, append(slices.Clone(s.WorkerCommand), "dns-ask")...); err != nil {
			return err
		}
	}
	asks, err := s.town.startIn(ctx, c.pod, "client of "+c.variant, append(slices.Clone(s.WorkerCommand), "dns-ask")...)
	if err != nil {
		return err
	}
	for _, operation := range []string{Query, Flood, Pairs, Go} {
		c.clients[operation] = asks
	}
	for _, library := range []string{Glibc, Musl} {
		if programs[library] == "" {
			continue
		}
		if c.clients[library], err = s.town.startIn(ctx, c.pod, library+" of "+c.variant, programs[library]); err != nil {
			return err
		}
	}
	s.operations = slices.DeleteFunc(slices.Clone(dnsOperations), func(o string) bool { return c.clients[o] == nil })
	return nil
}

// listPatience is how long it may take until the agent has read a pod's search list: it looks
// every ten seconds.
const listPatience = 30 * time.Second

// prove asks for everything until all of it is answered rightly, which also fills the
// caches of those that have some.
func (s *dnsSession) prove(ctx context.Context, c *dnsCell) error {
	var err error
	for begun := time.Now(); time.Since(begun) < listPatience; time.Sleep(50 * time.Millisecond) {
		if err = ctx.Err(); err != nil {
			return err
		}
		if err = s.proveOnce(c); err == nil {
			return nil
		}
	}
	return err
}

func (s *dnsSession) proveOnce(c *dnsCell) error {
	proof := s.town.command(c.pod, Query)
	proof.Prove = s.town.services
	if result, err := c.clients[Query].tellDNS(proof); err != nil {
		return err
	} else if result.Errors > 0 {
		return fmt.Errorf("ask for all Services: %s", result.FirstError)
	}
	for _, operation := range s.operations {
		do := s.town.command(c.pod, operation)
		do.Nanoseconds, do.Threads, do.Window = int64(time.Millisecond), floodShapes[0][0], floodShapes[0][1]
		before, err := c.pod.sent()
		if err != nil {
			return err
		}
		result, err := c.clients[operation].tellDNS(do)
		if err != nil {
			return err
		}
		after, err := c.pod.sent()
		if err != nil {
			return err
		}
		if want := c.queries(operation); result.Errors == 0 && int(after-before) != want*result.Count {
			return fmt.Errorf("%s: %d queries for %d operations, not %d for each", operation, after-before, result.Count, want)
		}
		if result.Errors > 0 || result.Count == 0 {
			return fmt.Errorf("%s: %d went well, %d wrong: %s", operation, result.Count, result.Errors, result.FirstError)
		}
	}
	return nil
}

// queries are how many an operation sends in a cell's pod.
func (c *dnsCell) queries(operation string) int {
	switch {
	case operation == Query || operation == Flood:
		return 1
	case c.variant == Millrace:
		return 2
	}
	return 2 * (len(dnsSearches) + 1)
}

// measure gives every variant its turn in every round, operation by operation, in random
// order.
func (s *dnsSession) measure(ctx context.Context) error {
	for round := range s.Rounds {
		s.progress("round %d of %d", round+1, s.Rounds)
		for _, operation := range s.operations {
			for _, i := range rand.Perm(len(s.cells)) {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := s.turn(s.cells[i], operation); err != nil {
					return fmt.Errorf("%s: %s: %w", s.cells[i].variant, operation, err)
				}
			}
		}
	}
	return nil
}

// floodShapes are forms of the client of a flood: threads, and queries in flight at each of
// its sockets. What is best depends on the server: each is tried in each turn, and the
// fastest counts.
var floodShapes = [][2]int{{1, 8}, {2, 8}, {1, 32}, {2, 32}}

func (s *dnsSession) turn(c *dnsCell, operation string) error {
	span := s.RoundTime / time.Duration(len(s.operations))
	if operation != Flood {
		figures, err := s.once(c, s.town.command(c.pod, operation), span)
		c.note(figures)
		return err
	}
	var best map[string]float64
	for _, shape := range floodShapes {
		do := s.town.command(c.pod, operation)
		do.Threads, do.Window = shape[0], shape[1]
		figures, err := s.once(c, do, span/time.Duration(len(floodShapes)))
		if err != nil {
			return err
		}
		if best == nil || figures[MetricRate(Flood)] > best[MetricRate(Flood)] {
			best = figures
		}
	}
	c.note(best)
	return nil
}

func (c *dnsCell) note(figures map[string]float64) {
	for metric, figure := range figures {
		c.samples[metric] = append(c.samples[metric], figure)
	}
}

// once does an operation for a time.
func (s *dnsSession) once(c *dnsCell, do dnsCommand, span time.Duration) (map[string]float64, error) {
	operation := do.Operation
	do.Nanoseconds = span.Nanoseconds()
	asked, busy := s.town.upstream.asked.Load(), c.serverTime()
	sent, err := c.pod.sent()
	if err != nil {
		return nil, err
	}
	result, err := c.clients[operation].tellDNS(do)
	if err != nil {
		return nil, err
	}
	busy = c.serverTime() - busy
	now, err := c.pod.sent()
	if err != nil {
		return nil, err
	}
	if result.Count == 0 {
		return nil, fmt.Errorf("none was answered, %d were not: %s", result.Errors, result.FirstError)
	}
	if n := s.town.upstream.asked.Load() - asked; n > 0 {
		return nil, fmt.Errorf("%d queries were not in the cache: the upstream was asked", n)
	}
	count := float64(result.Count)
	figures := map[string]float64{
		MetricClient(operation):  float64(result.CPU) / count / 1e3,
		MetricServer(operation):  float64(busy) / count / 1e3,
		MetricCPU(operation):     float64(result.CPU+busy) / count / 1e3,
		MetricQueries(operation): float64(now-sent) / count,
		MetricCount(operation):   count,
		MetricErrors(operation):  float64(result.Errors),
	}
	if operation == Flood {
		figures[MetricRate(operation)] = float64(result.Count) / (float64(result.Took) / 1e9)
	} else {
		figures[MetricP50(operation)], figures[MetricP99(operation)] = float64(result.P50)/1e3, float64(result.P99)/1e3
	}
	return figures, nil
}

// serverTime is the processor time that a cell's servers have used.
func (c *dnsCell) serverTime() (sum int64) {
	for _, pid := range c.servers {
		sum += processTime(pid)
	}
	return sum
}

// close takes the namespaces, the servers and the run's folders away.
func (s *dnsSession) close() error {
	var errs []error
	if s.town != nil {
		errs = append(errs, s.town.close())
	}
	return errors.Join(append(errs, s.run.close())...)
}

// dnsMetrics are the metrics of an operation with their units.
func dnsMetrics(operation string) [][2]string {
	metrics := [][2]string{
		{MetricP50(operation), "us"}, {MetricP99(operation), "us"}, {MetricCPU(operation), "us"}, {MetricClient(operation), "us"},
		{MetricServer(operation), "us"}, {MetricQueries(operation), "count"}, {MetricCount(operation), "count"},
		{MetricErrors(operation), "count"},
	}
	if operation == Flood {
		metrics = append([][2]string{{MetricRate(operation), "count"}}, metrics[2:]...)
	}
	return metrics
}

// summarize makes rows of the samples; a ratio is that to CoreDNS, or to unbound where
// there is none.
func (s *dnsSession) summarize() {
	var reference *dnsCell
	for _, c := range s.cells {
		if c.variant == CoreDNS || c.variant == Unbound && reference == nil {
			reference = c
		}
	}
	for _, c := range s.cells {
		for _, operation := range s.operations {
			for _, metric := range dnsMetrics(operation) {
				row := Row{Variant: c.variant, Metric: metric[0], Unit: metric[1]}
				s.report.Rows = append(s.report.Rows, summarize(row, c.samples[metric[0]], reference.samples[metric[0]], nil))
			}
		}
	}
	s.report.Goals = s.report.dnsGoals()
}

// lastProcessors are the last of those that this process may use, count at most.
func lastProcessors(count int) (cpus []int, err error) {
	last, err := lastProcessor()
	if err != nil {
		return nil, err
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("find processors: %w", err)
	}
	for cpu := last; cpu >= 0 && len(cpus) < count; cpu-- {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	slices.Reverse(cpus)
	return cpus, nil
}

func joined(numbers []int) string {
	return strings.ReplaceAll(strings.Trim(fmt.Sprint(numbers), "[]"), " ", ",")
}
