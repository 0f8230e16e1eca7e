package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// scaleInside measures, in the namespace of the API server.
func scaleInside(ctx context.Context, bin string, settings *scaleSettings) error {
	m := &measurement{settings: settings, bin: bin, report: newReport(settings)}
	err := m.report.take(settings.with)
	if err != nil {
		return err
	}
	say("etcd and kube-apiserver")
	if m.api, err = startAPIServer(ctx, bin, settings.services); err != nil {
		return err
	}
	if err := m.api.fill(ctx); err != nil {
		return fmt.Errorf("write %d Services: %w", settings.services, err)
	}
	// What was measured is told, also when the rest was not.
	return errors.Join(m.rounds(ctx), m.report.write(os.Stdout, settings.output))
}

func (m *measurement) rounds(ctx context.Context) error {
	names := strings.Split(m.settings.proxies, ",")
	for round := range m.settings.rounds {
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			say("round %d of %d: %s", round+1, m.settings.rounds, name)
			if err := m.turn(ctx, name); err != nil {
				return fmt.Errorf("measure %s: %w", name, err)
			}
		}
	}
	return nil
}

type measurement struct {
	settings *scaleSettings
	bin      string
	api      *apiServer
	report   *report
}

// turn measures one proxy, from its start in a node that was never served to its
// end. Only one runs at a time: each would have its own node, and here they would
// take processor time from each other and from the API server.
func (m *measurement) turn(ctx context.Context, name string) error {
	if err := clearTurn(ctx); err != nil {
		return err
	}
	if err := scaleNetwork(); err != nil {
		return err
	}
	if err := scaleCgroups(); err != nil {
		return err
	}
	if err := startServer(); err != nil {
		return err
	}
	client, err := startAsker()
	if err != nil {
		return err
	}
	idle(ctx)
	p, err := startProxy(name, m.bin, m.settings.millrace)
	if err != nil {
		return err
	}
	// Whoever waits for the client is told when that makes no sense any more.
	stop := context.AfterFunc(ctx, client.end)
	defer stop()
	go func() { <-p.ended; client.end() }()
	if err := m.measure(ctx, p, client); err != nil {
		_, ended := p.used()
		return errors.Join(ended, err)
	}
	if err := p.stop(); err != nil {
		return err
	}
	return clearTurn(ctx)
}

func (m *measurement) measure(ctx context.Context, p *running, client *asker) error {
	at, late, err := client.all(m.settings.services)
	if err != nil {
		return err
	}
	add := func(metric string, value float64) { m.report.add(p.name, metric, value) }
	add(loadTime, at.Sub(p.began).Seconds())
	say("%s serves all after %.2f s, %d of them late", p.name, at.Sub(p.began).Seconds(), late)
	if err := p.rest(ctx); err != nil {
		return err
	}
	loaded, err := p.used()
	if err != nil {
		return err
	}
	add(loadCPU, loaded.cpu)
	alone := func() time.Duration { return m.settings.pause + rand.N(m.settings.pause/4+1) }
	services := rand.Perm(m.settings.services)
	half := len(services) / 2
	if err := m.changes(ctx, p, client, services[:half], m.settings.changes, changeAlone, alone); err != nil {
		return err
	}
	changed, err := p.used()
	if err != nil {
		return err
	}
	add(changeCPU, (changed.cpu-loaded.cpu)*1000/float64(m.settings.changes))
	if err := m.amidOthers(ctx, p, client, services[:half], services[half:]); err != nil {
		return err
	}
	if err := p.rest(ctx); err != nil {
		return err
	}
	now, err := p.used()
	if err != nil {
		return err
	}
	for metric, bytes := range map[string]float64{
		residentLoaded: loaded.resident, resident: now.resident, pss: now.pss, anonymous: now.anonymous,
		peak: float64(p.peak.Load()), kernel: now.kernel,
	} {
		add(metric, bytes/1e6)
	}
	return nil
}

// changes measures so many, each of another Service, with a pause before each.
func (m *measurement) changes(ctx context.Context, p *running, client *asker, services []int, count int, metric string, pause func() time.Duration) error {
	for n := range count {
		service := services[n%len(services)]
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause()):
		}
		var asked, answered time.Time
		generation := (m.api.generation[service] + 1) % generations
		arrived, err := client.until(service, generation, func() error {
			asked = time.Now()
			err := m.api.replace(ctx, service)
			answered = time.Now()
			return err
		})
		if err != nil {
			return err
		}
		m.report.add(p.name, metric, milliseconds(arrived.Sub(asked)))
		m.report.add(p.name, metric+answerSuffix, milliseconds(arrived.Sub(answered)))
	}
	return nil
}

const othersASecond = 10

// amidOthers measures changes while others are made all the time.
func (m *measurement) amidOthers(ctx context.Context, p *running, client *asker, services, others []int) error {
	churning, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		every := time.NewTicker(time.Second / othersASecond)
		defer every.Stop()
		for n := 0; ; n++ {
			select {
			case <-churning.Done():
				ended <- nil
				return
			case <-every.C:
			}
			if err := m.api.replace(ctx, others[n%len(others)]); err != nil {
				ended <- fmt.Errorf("change others: %w", err)
				return
			}
		}
	}()
	err := m.changes(ctx, p, client, services, m.settings.amid, changeAmid, func() time.Duration { return 100*time.Millisecond + rand.N(300*time.Millisecond) })
	stop()
	if other := <-ended; err == nil {
		err = other
	}
	return err
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// startServer in the namespace of the endpoints, and return when it listens.
func startServer() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	command := inside(scalePods, self, "scale-server")
	stdout, err := command.StdoutPipe()
	if err != nil {
		return err
	}
	if _, err := launch(command, "server"); err != nil {
		return err
	}
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		return fmt.Errorf("wait for the endpoints' server: %w: %s", err, endOfLog("server"))
	}
	return nil
}

// idle waits until what the last turn left to the kernel is done, at most ten
// seconds: somebody else may keep the machine busy.
func idle(ctx context.Context) {
	for range 10 {
		before := idleTicks()
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		if idleTicks()-before > 90*float64(runtime.NumCPU()) {
			return
		}
	}
}

// idleTicks are the hundredths of a second in which a processor had nothing to do.
func idleTicks() float64 {
	text, _ := os.ReadFile("/proc/stat")
	fields := strings.Fields(string(text)) // cpu user nice system idle
	if len(fields) < 5 {
		return 0
	}
	ticks, _ := strconv.ParseFloat(fields[4], 64)
	return ticks
}
