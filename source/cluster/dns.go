package cluster

import (
	"fmt"
	"path"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/corefile"
)

// The objects that say how the DNS servers are configured.
var (
	dnsConfigKey  = Key{kindConfigMap.String(), corefile.ConfigMap}
	dnsCustomKey  = Key{kindConfigMap.String(), corefile.Custom}
	dnsServersKey = Key{kindDeployment.String(), corefile.Deployment}
)

// IsConfiguration says whether a ConfigMap is one that is read: those of CoreDNS, that of
// ip-masq-agent, and those of flannel.
func IsConfiguration(namespace, name string) bool {
	n := model.Name{Namespace: namespace, Name: name}
	return n == corefile.ConfigMap || n == corefile.Custom || n == MasqueradeConfigMap || slices.Contains(FlannelConfigMaps, n)
}

// dnsInput is what the configuration of the DNS servers is made of.
type dnsInput struct {
	// config and custom are nil for ConfigMaps that are not there.
	config, custom *corefile.Keys
	servers        *dnsServers
	// Why the latter two are not known.
	noCustom, noServers string
}

// dnsServers is the Deployment of CoreDNS.
type dnsServers struct {
	workload  *model.Workload
	container *corefile.Container
}

// keysOf are the keys of a ConfigMap, as the files that they become.
func keysOf(c *corev1.ConfigMap) *corefile.Keys {
	texts := make(map[string]string, len(c.Data)+len(c.BinaryData))
	for key, text := range c.Data {
		texts[key] = text
	}
	for key, data := range c.BinaryData {
		texts[key] = string(data)
	}
	return &corefile.Keys{Texts: texts}
}

// SetUnknown says why it is not known what one of the objects that configure the DNS servers
// says, as long as it is not put; "" where it is known not to be there, or nobody has asked.
func (c *Cluster) SetUnknown(k Key, why string) {
	c.remarked = c.remarked || c.unknown[k] != why
	if c.unknown[k] = why; why == "" {
		delete(c.unknown, k)
	}
}

// dnsNow is what is known of the DNS servers' configuration.
func (c *Cluster) dnsNow() *model.DNS {
	in := dnsInput{noCustom: c.unknown[dnsCustomKey], noServers: c.unknown[dnsServersKey]}
	in.config, _ = c.valueOf(dnsConfigKey).(*corefile.Keys)
	in.custom, _ = c.valueOf(dnsCustomKey).(*corefile.Keys)
	in.servers, _ = c.valueOf(dnsServersKey).(*dnsServers)
	if why := c.unknown[dnsConfigKey]; in.config == nil {
		if why == "" {
			return nil
		}
		return corefile.Unknown(why)
	}
	if c.dns == nil || c.dnsOf != in {
		c.dns, c.dnsOf = in.read(), in
	}
	return c.dns
}

// valueOf is what an object in force says, nil if there is none.
func (c *Cluster) valueOf(k Key) any {
	if o := c.inForce(k); o != nil {
		return o.value
	}
	return nil
}

// read reads the Corefile, with what it imports.
func (in dnsInput) read() *model.DNS {
	text, there := in.config.Texts[corefile.Key]
	if !there {
		return corefile.Unknown(fmt.Sprintf("the ConfigMap %s has no %s", corefile.ConfigMap, corefile.Key))
	}
	files := corefile.Files{ConfigMaps: map[string]*corefile.Keys{corefile.ConfigMap.Name: in.config, corefile.Custom.Name: in.custom}}
	if in.custom == nil && in.noCustom != "" {
		files.ConfigMaps[corefile.Custom.Name] = &corefile.Keys{Unread: in.noCustom}
	}
	switch {
	case in.servers != nil:
		files.Container = in.servers.container
	case in.noServers != "":
		files.Why = in.noServers
	default:
		files.Why = fmt.Sprintf("there is no Deployment %s", corefile.Deployment)
	}
	return corefile.Read(text, files)
}

// containerOf is how a Deployment runs CoreDNS.
func containerOf(d *appsv1.Deployment) *corefile.Container {
	pod := &d.Spec.Template.Spec
	to := &corefile.Container{Of: dnsServersKey.String()}
	at := slices.IndexFunc(pod.Containers, func(c corev1.Container) bool { return c.Name == "coredns" })
	if at < 0 && len(pod.Containers) != 1 {
		return to
	}
	c := &pod.Containers[max(at, 0)]
	if conf := confOf(append(slices.Clone(c.Command), c.Args...)); path.IsAbs(conf) && !strings.Contains(conf, "$(") {
		to.Corefile = path.Clean(conf)
	}
	to.Aliases, to.Hosts = hostsOf(pod)
	for _, m := range c.VolumeMounts {
		mount := mountOf(pod.Volumes, m.Name)
		mount.Path, mount.Sub = path.Clean("/"+m.MountPath), m.SubPath+m.SubPathExpr
		to.Mounts = append(to.Mounts, mount)
	}
	return to
}

// hostsOf is what stands in /etc/hosts of a pod beside names of one label, or why that is not
// known (kubelet, ensureHostsFile).
func hostsOf(pod *corev1.PodSpec) (aliases, unknown string) {
	switch {
	case pod.HostNetwork:
		return "", "/etc/hosts is that of the node (hostNetwork)"
	case pod.Subdomain != "" || pod.HostnameOverride != nil:
		return "", "/etc/hosts has a name of the pod's own (subdomain, hostnameOverride)"
	}
	for _, alias := range pod.HostAliases {
		aliases += alias.IP + " " + strings.Join(alias.Hostnames, " ") + "\n"
	}
	return aliases, ""
}

// confOf is the value of the flag -conf among the words of a command, "" if it has none. The
// last one counts.
func confOf(words []string) (conf string) {
	for i, word := range words {
		flag, value, same := strings.Cut(word, "=")
		if flag != "-conf" && flag != "--conf" {
			continue
		}
		if !same && i+1 < len(words) {
			value = words[i+1]
		}
		conf = value
	}
	return conf
}

// mountOf is what a volume of a pod has.
func mountOf(volumes []corev1.Volume, name string) (m corefile.Mount) {
	at := slices.IndexFunc(volumes, func(v corev1.Volume) bool { return v.Name == name })
	if at < 0 {
		return corefile.Mount{Else: "a volume that the pod does not have"}
	}
	switch v := volumes[at]; {
	case v.ConfigMap != nil:
		m.ConfigMap, m.Optional = v.ConfigMap.Name, v.ConfigMap.Optional != nil && *v.ConfigMap.Optional
		for _, item := range v.ConfigMap.Items {
			m.Items = append(m.Items, corefile.Item{Key: item.Key, Path: path.Clean(item.Path)})
		}
	case v.HostPath != nil:
		m.Else = "a hostPath"
	case v.EmptyDir != nil:
		m.Else = "an emptyDir"
	case v.Projected != nil:
		m.Else = "a projected volume"
	case v.Secret != nil:
		m.Else = "a Secret"
	default:
		m.Else = "a volume of another kind"
	}
	return m
}
