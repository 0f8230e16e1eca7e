package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/proc"
)

// Watcher is one way to look at drops while they happen.
type Watcher struct {
	Name string
	// About says how it looks, for people.
	About string
	// Watch looks at everything in the network namespaces at these paths until seen is
	// called, which says how many packets were counted that found no socket, and how many
	// of them came to this process one by one.
	Watch func(namespaces []string) (seen func() (counted, received uint64, err error), err error)
}

// DropsOptions are what a person can choose for Drops.
type DropsOptions struct {
	// Watchers are compared with nobody looking, which is called Off.
	Watchers []Watcher
	// Rounds is how often each has its turn, RoundTime how long one lasts, all
	// operations together; 0 is DefaultRounds and DropsRoundTime.
	Rounds    int
	RoundTime time.Duration
	// Progress receives a line for what takes time; nothing.
	Progress io.Writer
}

// DropsRoundTime is what a turn of Drops takes: shorter ones are all beginning.
const DropsRoundTime = 900 * time.Millisecond

// Off is the variant of Drops in which nobody looks.
const Off = "off"

// The operations of Drops. One thread does all of each, both ends of it, so that no
// scheduler is measured.
const (
	// Storm sends UDP packets of one byte to a port where nobody is, in batches.
	Storm = "storm"
	// Healthy opens a TCP connection, sends 64 bytes there and back, and closes it.
	Healthy = "healthy"
	// Stream sends 64 KiB over an open TCP connection.
	Stream = "stream"
)

var dropsOperations = []string{Storm, Healthy, Stream}

// Metrics of Drops.
const (
	// MetricSent is how many packets of a storm were sent in all, MetricDied how many the
	// kernel counted as having found no port, MetricCounted how many the watcher did and
	// MetricReceived how many came to it one by one.
	MetricSent     = "sent"
	MetricDied     = "died"
	MetricCounted  = "counted"
	MetricReceived = "received"
)

// MetricRate is the metric of how many of an operation were done in a second.
func MetricRate(operation string) string { return operation + " rate" }

// MetricTime is the metric of the processor time that one of an operation took, with all
// that the kernel did for it on that processor.
func MetricTime(operation string) string { return operation + " time" }

// Drops measures what it costs a sender that somebody looks at drops: in a storm of
// packets that die, and where all is well.
func Drops(ctx context.Context, o DropsOptions) (report *Report, err error) {
	if err := checkRounds(o.Rounds, o.RoundTime); err != nil {
		return nil, err
	}
	if o.Rounds == 0 {
		o.Rounds = DefaultRounds
	}
	if o.RoundTime == 0 {
		o.RoundTime = DropsRoundTime
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	run, err := openRun()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, run.close()) }()
	s, err := newSquall(run)
	if err != nil {
		return nil, err
	}
	defer s.close()
	report = &Report{Header: newHeader("drops", map[string]string{
		"rounds": fmt.Sprint(o.Rounds), "time per round": o.RoundTime.String(),
	}), Skipped: []Skipped{}, Warnings: []string{}}
	samples, err := o.play(ctx, s)
	if err != nil {
		return nil, err
	}
	for _, w := range append([]Watcher{{Name: Off}}, o.Watchers...) {
		for _, metric := range s.metrics {
			row := Row{Variant: w.Name, Metric: metric.name, Unit: metric.unit}
			report.Rows = append(report.Rows, summarize(row, samples[w.Name][metric.name], samples[Off][metric.name], nil))
		}
	}
	return report, nil
}

// play lets all have their turn in every round, in random order.
func (o *DropsOptions) play(ctx context.Context, s *squall) (map[string]map[string][]float64, error) {
	nobody := Watcher{Name: Off, Watch: func([]string) (func() (uint64, uint64, error), error) {
		return func() (uint64, uint64, error) { return 0, 0, nil }, nil
	}}
	all := append([]Watcher{nobody}, o.Watchers...)
	samples := map[string]map[string][]float64{}
	for _, w := range all {
		samples[w.Name] = map[string][]float64{}
	}
	for round := range o.Rounds {
		fmt.Fprintf(o.Progress, "round %d of %d\n", round+1, o.Rounds)
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, w := range all {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			figures, err := s.turn(w, o.RoundTime/time.Duration(len(dropsOperations)))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.Name, err)
			}
			for name, figure := range figures {
				samples[w.Name][name] = append(samples[w.Name][name], figure)
			}
		}
	}
	return samples, nil
}

// squall is two namespaces, and the sockets with which they are troubled.
type squall struct {
	client, server   string
	udp              int // of the client
	listener         int // of the server
	near, far        int // the two ends of an open connection
	headers          []message
	buffer           []byte
	metrics          []struct{ name, unit string }
	listens, nowhere unix.RawSockaddrInet4
}

// message is struct mmsghdr of linux/socket.h.
type message struct {
	header unix.Msghdr
	sent   uint32
	_      uint32
}

const (
	batch      = 64
	streamSize = 64 << 10
)

var (
	squallClient = netip.MustParsePrefix("10.0.0.1/30")
	squallServer = netip.MustParsePrefix("10.0.0.2/30")
)

func newSquall(run *run) (*squall, error) {
	s := &squall{
		client: filepath.Join(run.namespaces, "client"), server: filepath.Join(run.namespaces, "server"),
		udp: -1, listener: -1, near: -1, far: -1, buffer: make([]byte, streamSize),
		nowhere: rawAddress(netip.AddrPortFrom(squallServer.Addr(), 9)),
		listens: rawAddress(netip.AddrPortFrom(squallServer.Addr(), 80)),
	}
	for _, operation := range dropsOperations {
		s.metrics = append(s.metrics, struct{ name, unit string }{MetricRate(operation), "count"},
			struct{ name, unit string }{MetricTime(operation), "ns"})
	}
	for _, name := range []string{MetricSent, MetricDied, MetricCounted, MetricReceived} {
		s.metrics = append(s.metrics, struct{ name, unit string }{name, "count"})
	}
	for _, path := range []string{s.client, s.server} {
		if err := errors.Join(netns.Create(path), netns.Do(path, settings)); err != nil {
			return nil, err
		}
	}
	b := &bed{node: s.server}
	if err := b.makePair(s.client, "eth0"); err != nil {
		return nil, err
	}
	if err := netns.Do(s.client, func() error { return raise("eth0", squallClient) }); err != nil {
		return nil, err
	}
	return s, errors.Join(netns.Do(s.server, s.listen), netns.Do(s.client, s.open))
}

func (s *squall) listen() (err error) {
	if err := raise("eth0", squallServer); err != nil {
		return err
	}
	s.listener, err = listenOn(netip.AddrPortFrom(squallServer.Addr(), 80))
	return err
}

func (s *squall) open() (err error) {
	if s.udp, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	s.headers = make([]message, batch)
	one := unix.Iovec{Base: &s.buffer[0], Len: 1}
	for i := range s.headers {
		s.headers[i].header = unix.Msghdr{
			Name: (*byte)(unsafe.Pointer(&s.nowhere)), Namelen: unix.SizeofSockaddrInet4, Iov: &one, Iovlen: 1,
		}
	}
	s.near, s.far, err = s.connect()
	return err
}

// connect opens a connection and takes both its ends.
func (s *squall) connect() (near, far int, err error) {
	fd, errno, step := open(&s.listens)
	if errno != 0 {
		return -1, -1, fmt.Errorf("%s: %w", step, errno)
	}
	far, _, err = unix.Accept4(s.listener, unix.SOCK_CLOEXEC)
	if err != nil {
		unix.Close(int(fd))
		return -1, -1, fmt.Errorf("accept: %w", err)
	}
	return int(fd), far, nil
}

func (s *squall) close() {
	for _, fd := range []int{s.udp, s.listener, s.near, s.far} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// turn does each operation for a time while somebody looks.
func (s *squall) turn(w Watcher, each time.Duration) (map[string]float64, error) {
	figures := map[string]float64{}
	died, err := s.died()
	if err != nil {
		return nil, err
	}
	seen, err := w.Watch([]string{s.client, s.server})
	if err != nil {
		return nil, err
	}
	err = netns.Do(s.client, func() error {
		if err := pin(0); err != nil {
			return err
		}
		for operation, do := range map[string]func() (int, error){Storm: s.blow, Healthy: s.call, Stream: s.stream} {
			done, took, busy, err := repeated(each, do)
			if err != nil {
				return fmt.Errorf("%s: %w", operation, err)
			}
			figures[MetricRate(operation)] = float64(done) / took.Seconds()
			figures[MetricTime(operation)] = float64(busy.Nanoseconds()) / float64(done)
			if operation == Storm {
				figures[MetricSent] = float64(done)
			}
		}
		return nil
	})
	counted, received, stopped := seen()
	if err := errors.Join(err, stopped); err != nil {
		return nil, err
	}
	now, err := s.died()
	figures[MetricDied], figures[MetricCounted], figures[MetricReceived] = float64(now-died), float64(counted), float64(received)
	return figures, err
}

// died is how many packets have found no port at the server, as the kernel counts them.
func (s *squall) died() (count uint64, err error) {
	err = netns.Do(s.server, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		count, err = proc.Counter(string(text), "Udp.NoPorts")
		return err
	})
	return count, err
}

// repeated does something for a time: how often, how long that took, and how long the
// processor was busy with it.
func repeated(span time.Duration, do func() (int, error)) (done int, took, busy time.Duration, err error) {
	begun, used := time.Now(), threadTime()
	for took < span {
		n, err := do()
		if err != nil {
			return 0, 0, 0, err
		}
		done += n
		took = time.Since(begun)
	}
	return done, took, threadTime() - used, nil
}

// threadTime is the processor time of the calling thread; what the kernel does in
// interrupts meanwhile is with it where it has no clock of their own.
func threadTime() time.Duration {
	var at unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &at)
	return time.Duration(at.Nano())
}

// blow sends a batch of packets to nowhere.
func (s *squall) blow() (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(s.udp), uintptr(unsafe.Pointer(&s.headers[0])), batch, 0, 0, 0)
	if errno != 0 {
		return 0, fmt.Errorf("send packets: %w", errno)
	}
	return int(n), nil
}

// call makes a connection, speaks and closes it: first at the server, so that the
// client's port is free at once and no connection has to look for one.
func (s *squall) call() (int, error) {
	near, far, err := s.connect()
	if err != nil {
		return 0, err
	}
	words := s.buffer[:messageSize]
	for _, step := range []struct{ from, to int }{{near, far}, {far, near}} {
		if _, err = unix.Write(step.from, words); err == nil {
			_, err = unix.Read(step.to, words)
		}
		if err != nil {
			break
		}
	}
	return 1, errors.Join(err, unix.Close(far), unix.Close(near))
}

// stream sends a good deal of data over the open connection.
func (s *squall) stream() (int, error) {
	if n, err := unix.Write(s.near, s.buffer); err != nil || n != len(s.buffer) {
		return 0, fmt.Errorf("write %d bytes of %d: %w", n, len(s.buffer), err)
	}
	for got := 0; got < len(s.buffer); {
		n, err := unix.Read(s.far, s.buffer)
		if err != nil || n == 0 {
			return 0, fmt.Errorf("read: %d bytes: %w", n, err)
		}
		got += n
	}
	return 1, nil
}

// WriteDropsTable prints a report of Drops for people.
func (r *Report) WriteDropsTable(w io.Writer, watchers []Watcher) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n%s rounds of %s each\n\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go,
		r.Header.Settings["rounds"], r.Header.Settings["time per round"])
	var cells [][]string
	for _, operation := range dropsOperations {
		for _, watcher := range append([]Watcher{{Name: Off, About: "nobody looks"}}, watchers...) {
			rate := r.Row(watcher.Name, 0, "", MetricRate(operation))
			used := r.Row(watcher.Name, 0, "", MetricTime(operation))
			cells = append(cells, []string{operation, watcher.Name, fmt.Sprintf("%.0f", rate.Median), rate.Ratio.String(),
				fmt.Sprintf("%.0f", used.Median), used.Ratio.String(), fmt.Sprintf("%.0f", used.Min), watcher.About})
		}
	}
	out.columns([]string{"", "watched", "a second", "to off [95 %]", "CPU ns", "to off [95 %]", "least", ""}, cells)
	out.printf("\nOf the storm's packets\n")
	cells = nil
	for _, watcher := range append([]Watcher{{Name: Off}}, watchers...) {
		line := []string{watcher.Name}
		for _, metric := range []string{MetricSent, MetricDied, MetricCounted, MetricReceived} {
			line = append(line, fmt.Sprintf("%.0f", total(r.Row(watcher.Name, 0, "", metric))))
		}
		cells = append(cells, line)
	}
	out.columns([]string{"watched", "sent", "died", "counted", "received one by one"}, cells)
	out.printf("\nstorm: UDP packets of one byte to a port where nobody is. healthy: a TCP connection,\n64 bytes there and back, close. stream: 64 KiB over an open connection. One thread does\nall of it on one processor; CPU is its time for one of them. died is Udp NoPorts.\n")
	return out.err
}

func total(row *Row) (sum float64) {
	for _, sample := range row.Samples {
		sum += sample
	}
	return sum
}

// Miscounted says that a packet died which a watcher has not counted, or the other way
// round.
func (r *Report) Miscounted(watchers []Watcher) bool {
	for _, w := range watchers {
		died, counted := r.Row(w.Name, 0, "", MetricDied), r.Row(w.Name, 0, "", MetricCounted)
		for round := range died.Samples {
			if died.Samples[round] != counted.Samples[round] {
				return true
			}
		}
	}
	return false
}
