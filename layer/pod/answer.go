package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
)

// Answer does what the plugin asks: it implements cni.Answer. Asked twice for the same, it
// answers twice the same.
func (l *Layer) Answer(ctx context.Context, r *cni.Request) (*types100.Result, error) {
	result, err := l.do(ctx, r)
	l.mu.Lock()
	defer l.mu.Unlock()
	name := strings.ToLower(r.Command)
	if err != nil {
		name += "_failed"
	}
	if isCommand(r.Command) {
		l.answers[name]++
	}
	return result, err
}

func isCommand(text string) bool {
	return slices.Contains([]string{cni.Add, cni.Del, cni.Check, cni.GC, cni.Status}, text)
}

func (l *Layer) do(ctx context.Context, r *cni.Request) (result *types100.Result, err error) {
	config, err := r.Read()
	if err != nil {
		return nil, err
	}
	if len(config.Name) > mostName || strings.ContainsAny(config.Name, " \n") {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("the network's name has more than %d characters, or a space", mostName), "")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if ctx.Err() != nil {
		return nil, types.NewError(types.ErrTryAgainLater, "the agent was busy with others for too long", "")
	}
	key := pool.Key{Container: r.Container, Interface: r.Interface}
	switch r.Command {
	case cni.Add:
		err = l.alone(key, func() (err error) {
			result, err = l.add(r, config, key)
			return err
		})
		return result, err
	case cni.Del:
		return nil, l.alone(key, func() error { return l.del(key) })
	case cni.Check:
		return nil, l.alone(key, func() error { return l.check(r, config, key) })
	case cni.GC:
		return nil, l.collect(config)
	case cni.Status:
		return nil, l.status()
	}
	return nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("unknown command %q", r.Command), "")
}

// mostName is how long a network's name may be: it is in an alias, behind 64 characters
// of a container and 15 of an interface.
const mostName = 63

// spaceOf is the path of the open file of a request's namespace.
func spaceOf(r *cni.Request) string { return fmt.Sprintf("/proc/self/fd/%d", r.Namespace.Fd()) }

// add gives an interface its network. It is written down first which addresses it has:
// whoever dies in between leaves a lease without a device, which the next process takes
// back.
func (l *Layer) add(r *cni.Request, config *cni.Config, key pool.Key) (*types100.Result, error) {
	switch {
	case r.Namespace == nil:
		return nil, types.NewError(types.ErrInvalidNetNS, "ADD without a network namespace", "")
	case key.Container == "" || key.Interface == "":
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "ADD without a container or an interface", "")
	case config.RawPrevResult != nil:
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "millrace makes the pod's interface: it has to be the first plugin of the list", "")
	case len(l.pool.Ranges()) == 0:
		return nil, types.NewError(types.ErrTryAgainLater, l.noRanges(), "")
	}
	asking := podOf(pool.Lease{Key: key, Pod: r.Pod()})
	bandwidth, err := bandwidthFor(config, asking)
	if err != nil {
		return nil, err
	}
	ports, err := l.allot(config, asking)
	if err != nil {
		return nil, err
	}
	space := spaceOf(r)
	if lease, had := l.pool.Lease(key); had && lease.Bandwidth == bandwidth && slices.Equal(lease.Ports, ports) {
		pod := podOf(lease)
		if missing, err := l.host.check(pod, space); err == nil && len(missing) == 0 {
			return l.result(pod, r), nil
		}
	}
	want := pool.Lease{Key: key, Network: config.Name, Pod: r.Pod(), Bandwidth: bandwidth, Ports: ports}
	lease, err := l.pool.Take(want, time.Now())
	if errors.Is(err, pool.ErrFull) {
		return nil, types.NewError(types.ErrTryAgainLater, fmt.Sprintf("no address for the pod: %v: delete pods of this node, or give it a larger range (spec.podCIDRs)", err), "")
	}
	if err != nil {
		return nil, err
	}
	pod := podOf(lease)
	if err = l.record(); err == nil {
		to, from := l.lengths.of(pod), sources(l.cluster, l.own)
		err = l.unlocked(&l.building, func() error { return l.host.build(pod, space, to, from) })
		if err == nil {
			l.inside[key] = to
		}
	}
	if err != nil {
		l.pool.Give(key, time.Now())
		return nil, errors.Join(fmt.Errorf("give %s its network: %w", pod.Object(), err), l.record())
	}
	return l.result(pod, r), nil
}

func podOf(lease pool.Lease) *Pod { return &Pod{Lease: lease, Device: deviceName(lease.Key)} }

// result is what the runtime is told of a pod (https://www.cni.dev/docs/spec/#add-success).
func (l *Layer) result(pod *Pod, r *cni.Request) *types100.Result {
	inside := 1
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Interfaces: []*types100.Interface{
		{Name: pod.Device, Mac: nodeMAC(pod.Key).String(), Mtu: l.lengths.device},
		{Name: pod.Interface, Mac: podMAC(pod.Key).String(), Mtu: l.lengths.device, Sandbox: r.Space},
	}}
	for _, addr := range pod.Addresses {
		gateway := gatewayOf(addr)
		result.IPs = append(result.IPs, &types100.IPConfig{Interface: &inside, Address: asNet(netip.PrefixFrom(addr, addr.BitLen())), Gateway: gateway.AsSlice()})
		result.Routes = append(result.Routes, &types.Route{Dst: asNet(netip.PrefixFrom(gateway, 0).Masked()), GW: gateway.AsSlice()})
	}
	return result
}

func asNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// del takes an interface's network back, first that packets are led to it, then the devices:
// as long as they are there nobody else may have the addresses. What is not there is no error.
func (l *Layer) del(key pool.Key) error {
	l.pool.GivePorts(key)
	l.tellPorts()
	if err := l.forget(key); err != nil {
		return err
	}
	l.giveWay()
	if err := l.unlocked(&l.removing, func() error { return l.host.demolish(deviceName(key)) }); err != nil {
		return err
	}
	if _, had := l.pool.Lease(key); !had {
		return releaseOfOthers(l.settings.HostLocal, key)
	}
	l.pool.Give(key, time.Now())
	return l.record()
}

// check says whether a pod's network is as it was given.
func (l *Layer) check(r *cni.Request, config *cni.Config, key pool.Key) error {
	lease, had := l.pool.Lease(key)
	if !had {
		return types.NewError(types.ErrUnknownContainer, fmt.Sprintf("%s was given no network here: delete the pod, and it is made anew", key), "")
	}
	if r.Namespace == nil {
		return types.NewError(types.ErrInvalidNetNS, "CHECK without a network namespace", "")
	}
	previous, err := config.Previous()
	if err != nil {
		return err
	}
	pod := podOf(lease)
	ports, err := portsOf(config.RuntimeConfig.PortMappings, pod, l.pool.Ranges())
	if err != nil {
		return err
	}
	missing, err := l.host.check(pod, spaceOf(r))
	if err != nil {
		return err
	}
	for _, port := range ports {
		if !slices.Contains(lease.Ports, port) {
			missing = append(missing, "hostPort "+port.String())
		}
	}
	if previous != nil {
		missing = append(missing, saidOtherwise(pod, previous)...)
	}
	if len(missing) > 0 {
		return types.NewError(types.ErrInternal, fmt.Sprintf("the network of %s is not whole: missing is %s: delete the pod, and it is made anew", pod.Object(), strings.Join(missing, "; ")), "")
	}
	return nil
}

// saidOtherwise lists the addresses that the runtime knows of our interface and a pod does
// not have. Other plugins of the list may have added interfaces of their own.
func saidOtherwise(pod *Pod, previous *types100.Result) (missing []string) {
	for _, ip := range previous.IPs {
		if ip == nil || ip.Interface == nil || *ip.Interface < 0 || *ip.Interface >= len(previous.Interfaces) {
			continue
		}
		if of := previous.Interfaces[*ip.Interface]; of == nil || of.Name != pod.Interface || of.Sandbox == "" {
			continue
		}
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		if !slices.Contains(pod.Addresses, addr.Unmap()) {
			missing = append(missing, fmt.Sprintf("address %s, which is in prevResult", addr.Unmap()))
		}
	}
	return missing
}

// collect takes back the networks of all interfaces that the runtime does not name any
// more (https://www.cni.dev/docs/spec/#gc-clean-up-any-stale-resources).
func (l *Layer) collect(config *cni.Config) error {
	valid := map[pool.Key]bool{}
	for _, a := range config.ValidAttachments {
		valid[pool.Key{Container: a.ContainerID, Interface: a.IfName}] = true
	}
	var failures []error
	for _, lease := range l.pool.Leases() {
		if lease.Network == config.Name && !valid[lease.Key] {
			failures = append(failures, l.alone(lease.Key, func() error { return l.del(lease.Key) }))
		}
	}
	return errors.Join(failures...)
}

// status says whether the next ADD would succeed, and whether pods reach others
// (https://www.cni.dev/docs/spec/#status-check-plugin-status).
func (l *Layer) status() error {
	ranges := l.pool.Ranges()
	if len(ranges) == 0 {
		return types.NewError(types.ErrPluginNotAvailable, l.noRanges(), "")
	}
	if err := l.forwards(); err != nil {
		return types.NewError(types.ErrLimitedConnectivity, err.Error(), "")
	}
	if !l.pool.Room() {
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("%v of the node's ranges (%v)", pool.ErrFull, ranges), "")
	}
	return nil
}
